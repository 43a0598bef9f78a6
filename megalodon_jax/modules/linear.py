"""The linear layer of every block."""

from functools import partial
from typing import Any

import jax
from flax import nnx
from jax import numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from megalodon_jax.config import DType, ModelConfig
from megalodon_jax.modules.parameters import kernel_initializer, parameter
from megalodon_jax.parallel.sharding import axis_size, constrain
from megalodon_jax.typing import Array, Float, Float32

# Names for policies of `jax.checkpoint`: what attention is made of, any other product, a weight
# rounded to the products' type, and features gathered from the devices that share the matrices.
PROJECTION, PRODUCT, WEIGHT, GATHERED = "projection", "product", "weight", "gathered"


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def mixed_matmul(
    x: Float[Array, "... in"],
    kernel: Float[Array, "in out"],
    dtype: DType,
    axes: tuple[str | None, str | None] = (None, None),
) -> Float[Array, "... out"]:
    """x @ kernel with operands and result rounded to `dtype`, and sums in float32.

    So is the gradient of x. The kernel's leaves in the kernel's own type, where the kernel is.

    Args:
      x: (B, L, in) if there is a mesh.
      kernel: weights.
      dtype: of the product.
      axes: logical names of the kernel's axes; a mesh gathers the side of the residual stream.
    """
    return _forward(x, kernel, dtype, axes)[0]


def _forward(x: Array, kernel: Array, dtype: DType, axes: tuple[str | None, str | None]):
    rounded = _place(x.astype(dtype), axes[0])
    if axes[0] == "embed" and axis_size("model") > 1:
        rounded = checkpoint_name(rounded, GATHERED)
    rounded_kernel = constrain(kernel.astype(dtype), *map(_gathered, axes))
    rounded_kernel = checkpoint_name(rounded_kernel, WEIGHT)
    # An empty array carries the operands' own types to the backward pass.
    types = jnp.zeros((0,), x.dtype), jnp.zeros((0,), kernel.dtype)
    y = _place(_contract(rounded, rounded_kernel, ((x.ndim - 1,), (0,)), dtype), _result(axes[1]))
    return y, (rounded, rounded_kernel, types)


def _backward(dtype: DType, axes: tuple[str | None, str | None], residuals: Any, g: Array):
    x, kernel, (like_x, like_kernel) = residuals
    g = _place(g, axes[1])
    leading = tuple(range(x.ndim - 1))
    dx = _place(_contract(g, kernel, ((g.ndim - 1,), (1,)), dtype), _result(axes[0]))
    dkernel = constrain(_contract(x, g, (leading, leading), jnp.float32), *axes)
    return dx.astype(like_x.dtype), dkernel.astype(like_kernel.dtype)


def _gathered(axis: str | None) -> str | None:
    return None if axis == "embed" else axis


def _result(axis: str | None) -> str | None:
    """Where a product's sums over devices are left: the residual stream is split by channels."""
    return "channels" if axis == "embed" else axis


def _place(x: Array, last: str | None) -> Array:
    return constrain(x, "batch", "length", _gathered(last)) if x.ndim == 3 else x


def _contract(a: Array, b: Array, axes: tuple[tuple[int, ...], tuple[int, ...]], out: Any) -> Array:
    return jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=out)


mixed_matmul.defvjp(_forward, _backward)


class Linear(nnx.Module):
    """X W + b: the product in `config.dtype`, then the bias in float32.

    The product carries a name for policies of `jax.checkpoint`; the pointwise work around it is
    float32, rounds once at its end, and is cheap to do again.

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
        self.axes = axes
        self.kernel = parameter(
            initialize(rngs.params(), (in_features, out_features), dtype), *axes
        )
        self.bias = parameter(jnp.zeros(out_features, dtype), axes[1]) if use_bias else None

    def __call__(
        self, x: Float[Array, "... in"], *, name: str = PRODUCT
    ) -> Float32[Array, "... out"]:
        """Maps the last axis of x."""
        return self.add_bias(self.product(x, name=name))

    def product(
        self, x: Float[Array, "... in"], *, name: str | None = None
    ) -> Float[Array, "... out"]:
        """X W, rounded to `config.dtype`, under a name for policies if there is one."""
        y = mixed_matmul(x, self.kernel[...], self.dtype, self.axes)
        return y if name is None else checkpoint_name(y, name)

    def add_bias(self, product: Float[Array, "... out"]) -> Float32[Array, "... out"]:
        """A product and the bias, in float32."""
        y = product.astype(jnp.float32)
        return y if self.offset is None else y + self.offset

    @property
    def offset(self) -> Float32[Array, " out"] | None:
        """b in float32."""
        return None if self.bias is None else self.bias[...].astype(jnp.float32)
