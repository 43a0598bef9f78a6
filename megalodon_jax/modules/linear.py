"""The linear layer of every block."""

from functools import partial

import jax
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.config import DType, ModelConfig
from megalodon_jax.modules.parameters import kernel_initializer, parameter
from megalodon_jax.typing import Array, Float, Float32


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def mixed_matmul(
    x: Float[Array, "... in"], kernel: Float[Array, "in out"], dtype: DType
) -> Float32[Array, "... out"]:
    """x @ kernel with operands rounded to `dtype` and sums and result in float32.

    So are both products of the backward pass: the incoming gradient is rounded to `dtype` once, the
    kernel's gradient leaves in the kernel's own type.
    """
    return _contract(x.astype(dtype), kernel.astype(dtype), ((x.ndim - 1,), (0,)))


def _forward(x: Array, kernel: Array, dtype: DType) -> tuple[Array, tuple[Array, Array, Array]]:
    rounded = x.astype(dtype)
    # An empty array carries x's own type to the backward pass.
    residuals = (rounded, kernel, jnp.zeros((0,), x.dtype))
    return _contract(rounded, kernel.astype(dtype), ((x.ndim - 1,), (0,))), residuals


def _backward(dtype: DType, residuals: tuple[Array, Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel, like_x = residuals
    g = g.astype(dtype)
    leading = tuple(range(x.ndim - 1))
    dx = _contract(g, kernel.astype(dtype), ((g.ndim - 1,), (1,)))
    dkernel = _contract(x, g, (leading, leading))
    return dx.astype(like_x.dtype), dkernel.astype(kernel.dtype)


def _contract(a: Array, b: Array, axes: tuple[tuple[int, ...], tuple[int, ...]]) -> Array:
    return jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=jnp.float32)


mixed_matmul.defvjp(_forward, _backward)


class Linear(nnx.Module):
    """X W + b: operands of the product in `config.dtype`, its result and the bias in float32.

    Float32 results let the pointwise work that follows round once, at its end.

    Args:
      config: start values (`init_mode`) and types.
      in_features: rows of W.
      out_features: columns of W.
      axes: logical names of W's two axes, for sharding.
      use_bias: whether b is there; it starts at zero.
      rngs: source of start values.
    """

    def __init__(
        self,
        config: ModelConfig,
        in_features: int,
        out_features: int,
        axes: tuple[str, str],
        *,
        use_bias: bool,
        rngs: nnx.Rngs,
    ):
        dtype = jnp.dtype(config.param_dtype)
        initialize = kernel_initializer(config.init_mode)
        self.dtype: DType = config.dtype
        self.kernel = parameter(
            initialize(rngs.params(), (in_features, out_features), dtype), *axes
        )
        self.bias = parameter(jnp.zeros(out_features, dtype), axes[1]) if use_bias else None

    def __call__(self, x: Float[Array, "... in"]) -> Float32[Array, "... out"]:
        """Maps the last axis of x."""
        y = mixed_matmul(x, self.kernel[...], self.dtype)
        return y if self.bias is None else y + self.bias[...].astype(jnp.float32)
