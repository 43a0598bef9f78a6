"""The linear layer of every block."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Self

import jax
from flax import nnx
from jax import numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from megalodon_jax.config import InitMode, ModelConfig
from megalodon_jax.modules.parameters import kernel_initializer, parameter
from megalodon_jax.parallel.sharding import axis_size, constrain, has_multiple_devices
from megalodon_jax.typing import Array, Float, Float32
from pallas_kernels.common.target import find_target

# Checkpoint names for policies of `jax.checkpoint`: the projections that attention reads, every
# other product, a weight cast to the compute dtype, activations gathered under tensor parallelism.
PROJECTION, PRODUCT, WEIGHT, GATHERED = "projection", "product", "weight", "gathered"
LogicalAxes = tuple[str | None, str | None]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def mixed_matmul(
    x: Float[Array, "... in"],
    kernel: Float[Array, "in out"],
    dtype: DTypeLike,
    axes: LogicalAxes = (None, None),
    reduce_dtype: DTypeLike = jnp.float32,
) -> Float[Array, "... out"]:
    """x @ kernel in `dtype` with float32 accumulation.

    dx has `dtype` too; the weight gradient keeps the weight's dtype and sharding.

    Args:
      x: (B, L, in) if there is a mesh.
      kernel: weights.
      dtype: of operands and result.
      axes: logical names of the kernel's axes; a mesh gathers the axis of the residual stream.
      reduce_dtype: in which devices sum their gradients of the weights; one device keeps float32.
    """
    return _forward(x, kernel, dtype, axes, reduce_dtype)[0]


def _forward(x: Array, kernel: Array, dtype: DTypeLike, axes: LogicalAxes, reduce_dtype: DTypeLike):
    del reduce_dtype
    x_cast = _constrain_features(x.astype(dtype), axes[0])
    if axes[0] == "embed" and axis_size("model") > 1:
        x_cast = checkpoint_name(x_cast, GATHERED)
    kernel_cast = constrain(kernel.astype(dtype), *map(_gathered_axis, axes))
    kernel_cast = checkpoint_name(kernel_cast, WEIGHT)
    # Empty arrays carry the operands' own dtypes to the backward pass.
    dtypes = jnp.zeros((0,), x.dtype), jnp.zeros((0,), kernel.dtype)
    y = _contract(x_cast, kernel_cast, ((x.ndim - 1,), (0,)), dtype)
    return _constrain_features(y, _reduced_axis(axes[1])), (x_cast, kernel_cast, dtypes)


def _backward(
    dtype: DTypeLike, axes: LogicalAxes, reduce_dtype: DTypeLike, residuals: Any, dy: Array
):
    x, kernel, (like_x, like_kernel) = residuals
    dy = _constrain_features(dy, axes[1])
    leading = tuple(range(x.ndim - 1))
    dx = _contract(dy, kernel, ((dy.ndim - 1,), (1,)), dtype)
    dx = _constrain_features(dx, _reduced_axis(axes[0]))
    # The partitioner sums the product over devices in the dtype that the product returns.
    sum_dtype = reduce_dtype if has_multiple_devices() else jnp.float32
    dkernel = constrain(_contract(x, dy, (leading, leading), sum_dtype), *axes)
    return dx.astype(like_x.dtype), dkernel.astype(like_kernel.dtype)


mixed_matmul.defvjp(_forward, _backward)


def _gathered_axis(axis: str | None) -> str | None:
    return None if axis == "embed" else axis


def _reduced_axis(axis: str | None) -> str | None:
    """Logical axis of a product's features: the residual stream is sharded by channels."""
    return "channels" if axis == "embed" else axis


def _constrain_features(x: Array, axis: str | None) -> Array:
    return constrain(x, "batch", "length", _gathered_axis(axis)) if x.ndim == 3 else x


def _contract(
    a: Array, b: Array, axes: tuple[Sequence[int], Sequence[int]], dtype: DTypeLike
) -> Array:
    out = jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=jnp.dtype(dtype))
    if out.ndim == 3 and has_multiple_devices() and find_target().platform == "gpu":
        # With several devices XLA chooses other layouts, and transposes activations for the norms
        # and heads: 6.4 of 594 ms of a step of mega1.3B on four H200s.
        out = with_layout_constraint(out, Layout(tuple(range(out.ndim))))
    return out


class Linear(nnx.Module):
    """X W + b: the product in `dtype` with float32 accumulation, then the bias in float32.

    Args:
      in_features: rows of W.
      out_features: columns of W.
      use_bias: whether b is there; it starts at zero.
      axes: logical names of W's two axes, for sharding.
      init_mode: initializer of W by its released name.
      dtype: of the product.
      param_dtype: of W and b.
      reduce_dtype: in which devices sum their gradients of W.
      rngs: source of initial values.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        axes: LogicalAxes = (None, None),
        init_mode: InitMode = "he",
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        reduce_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        initialize = kernel_initializer(init_mode)
        self.dtype = jnp.dtype(dtype)
        self.reduce_dtype = jnp.dtype(reduce_dtype)
        self.axes = axes
        kernel = initialize(rngs.params(), (in_features, out_features), jnp.dtype(param_dtype))
        self.kernel = parameter(kernel, *axes)
        self.bias = parameter(jnp.zeros(out_features, param_dtype), axes[1]) if use_bias else None

    @classmethod
    def from_config(
        cls,
        config: ModelConfig,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool,
        axes: LogicalAxes,
        rngs: nnx.Rngs,
    ) -> Self:
        """A linear layer with a model's initializer and dtypes."""
        return cls(
            in_features,
            out_features,
            use_bias=use_bias,
            axes=axes,
            init_mode=config.init_mode,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            reduce_dtype=config.reduce_dtype,
            rngs=rngs,
        )

    def __call__(
        self, x: Float[Array, "... in"], *, name: str = PRODUCT
    ) -> Float32[Array, "... out"]:
        """Maps the last axis of x; `name` is the product's checkpoint name."""
        y = self.product(x, name=name).astype(jnp.float32)
        offset = self.offset
        return y if offset is None else y + offset

    def product(
        self, x: Float[Array, "... in"], *, name: str | None = None
    ) -> Float[Array, "... out"]:
        """X W in `dtype`, under a checkpoint name if there is one."""
        y = mixed_matmul(x, self.kernel[...], self.dtype, self.axes, self.reduce_dtype)
        return y if name is None else checkpoint_name(y, name)

    @property
    def offset(self) -> Float32[Array, " out"] | None:
        """b in float32."""
        return None if self.bias is None else self.bias[...].astype(jnp.float32)
