"""The matrix product of every linear layer: precision, sharding, layout."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax import numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from megalodon_jax.modules.precision import at_least_float32
from megalodon_jax.parallel.sharding import constrain, has_multiple_devices
from megalodon_jax.typing import Array, Float
from pallas_kernels.common.target import find_target

# Checkpoint names for policies of `jax.checkpoint`: the projections that attention reads, every
# other product, the output of a norm or gate, a weight cast to the compute dtype, shards of
# activations received from other devices under tensor parallelism, the sums over channels that
# these devices exchange.
PROJECTION, PRODUCT, ACTIVATION, WEIGHT = "projection", "product", "activation", "weight"
GATHERED, STATISTICS = "gathered", "statistics"
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
        Tensor parallelism over `model` has its own products (`collective_matmul`).
      reduce_dtype: in which devices sum their gradients of the weights; one device keeps float32.
    """
    return _forward(x, kernel, dtype, axes, reduce_dtype)[0]


def _forward(x: Array, kernel: Array, dtype: DTypeLike, axes: LogicalAxes, reduce_dtype: DTypeLike):
    del reduce_dtype
    x_cast = _constrain_features(x.astype(dtype), axes[0])
    kernel_cast = constrain(kernel.astype(dtype), *map(_gathered_axis, axes))
    kernel_cast = checkpoint_name(kernel_cast, WEIGHT)
    # Empty arrays carry the operands' own dtypes to the backward pass.
    dtypes = jnp.zeros((0,), x.dtype), jnp.zeros((0,), kernel.dtype)
    y = contract(x_cast, kernel_cast, ((x.ndim - 1,), (0,)), dtype)
    return _constrain_features(y, _reduced_axis(axes[1])), (x_cast, kernel_cast, dtypes)


def _backward(
    dtype: DTypeLike, axes: LogicalAxes, reduce_dtype: DTypeLike, residuals: Any, dy: Array
):
    x, kernel, (like_x, like_kernel) = residuals
    dy = _constrain_features(dy, axes[1])
    leading = tuple(range(x.ndim - 1))
    dx = contract(dy, kernel, ((dy.ndim - 1,), (1,)), dtype)
    dx = _constrain_features(dx, _reduced_axis(axes[0]))
    # The partitioner sums the product over devices in the dtype that the product returns.
    sum_dtype = reduce_dtype if has_multiple_devices() else at_least_float32(dtype)
    dkernel = constrain(contract(x, dy, (leading, leading), sum_dtype), *axes)
    return dx.astype(like_x.dtype), dkernel.astype(like_kernel.dtype)


mixed_matmul.defvjp(_forward, _backward)


# Qwix replaces this function while a method that it wraps runs.
_dot_general = jax.lax.dot_general
_DOT_GENERAL_CODE = _dot_general.__code__


def interceptable_matmul(
    x: Float[Array, "... in"], kernel: Any, dtype: DTypeLike, axes: LogicalAxes = (None, None)
) -> Float[Array, "... out"]:
    """x @ kernel by one plain `jax.lax.dot_general`, which Qwix intercepts (LoRA, quantization).

    Qwix adds Variables to the module whose method calls the product, and these must not come from
    the trace inside a `custom_vjp`: `mixed_matmul` would hide them.

    Args:
      x: features.
      kernel: an array, or what Qwix puts in its place.
      dtype: of operands and result.
      axes: logical names of the kernel's axes.

    Raises:
      RuntimeError: called while Qwix intercepts nothing: its LoRA would be left out.
    """
    if jax.lax.dot_general is _dot_general and _dot_general.__code__ is _DOT_GENERAL_CODE:
        raise RuntimeError(
            "a layer that Qwix wraps was called outside the wrapped method, where its LoRA and "
            "quantized weights have no effect; call the model itself, or name the method to Qwix: "
            "methods=('hidden',)"
        )
    x = _constrain_features(x.astype(dtype), axes[0])
    if not hasattr(kernel, "array"):  # Qwix's box round a quantized weight
        kernel = constrain(kernel.astype(dtype), *map(_gathered_axis, axes))
    numbers = (((x.ndim - 1,), (0,)), ((), ()))
    y = jax.lax.dot_general(x, kernel, numbers, preferred_element_type=jnp.dtype(dtype))
    return _constrain_features(y.astype(dtype), _reduced_axis(axes[1]))


def is_quantized(kernel: Any) -> bool:
    """Whether a weight is a `qwix.QArray`: integer codes and scales."""
    return hasattr(kernel, "qvalue")


def quantized_matmul(
    x: Float[Array, "... in"], kernel: Any, dtype: DTypeLike, axes: LogicalAxes = (None, None)
) -> Float[Array, "... out"]:
    """x @ kernel in `dtype` for a `qwix.QArray`; arguments as for `mixed_matmul`."""
    import qwix

    x = _constrain_features(x.astype(dtype), axes[0])
    y = qwix.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
    return _constrain_features(y.astype(dtype), _reduced_axis(axes[1]))


def is_wrapped_by_qwix(module: nnx.Module) -> bool:
    """Whether the module is part of a model that `qwix.quantize_model` returned."""
    return hasattr(module, "qwix_path")


def _gathered_axis(axis: str | None) -> str | None:
    return None if axis == "embed" else axis


def _reduced_axis(axis: str | None) -> str | None:
    """Logical axis of a product's features: the residual stream is sharded by channels."""
    return "channels" if axis == "embed" else axis


def _constrain_features(x: Array, axis: str | None) -> Array:
    return constrain(x, "batch", "length", _gathered_axis(axis)) if x.ndim == 3 else x


def contract(
    a: Array, b: Array, axes: tuple[Sequence[int], Sequence[int]], dtype: DTypeLike
) -> Array:
    """Contraction over `axes` of a and b, accumulated in float32; three axes are row-major."""
    out = jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=jnp.dtype(dtype))
    if out.ndim == 3 and has_multiple_devices() and find_target().platform == "gpu":
        # With several devices XLA chooses other layouts, and transposes activations for the norms
        # and heads: 6.4 of 594 ms of a step of mega1.3B on four H200s.
        out = with_layout_constraint(out, Layout(tuple(range(out.ndim))))
    return out
