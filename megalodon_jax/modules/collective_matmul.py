"""Products under tensor parallelism whose exchanges run beside the products.

The residual stream is sharded by channels over the mesh axis `model` of n devices, every device has
(B, L, D/n). Each product is split into n smaller ones, so that one shard travels while another is
multiplied (Wang et al. 2023, "Overlap communication with dependent computation via decomposition").
Shards stay row-major: an exchange transposes nothing.

    column-parallel   y = sum_s x_s W[s, :]         the shards x_s come from the other devices
      backward        dx_s = sum_k dy_k W_k[s, :]^T is sent to device s, which adds what it receives
                      dW[s, :] = x_s^T dy           from the shards received in the forward pass
    row-parallel      y_s = h W[:, s]               is sent to device s, which adds what it receives
      backward        dh = sum_s dy_s W[:, s]^T     the shards dy_s come from the other devices
                      dW[:, s] = h^T dy_s

A shard goes from its owner directly to each of the n - 1 others: no exchange waits for another, and
terms from other devices are rounded once (to `dtype`) and added in float32.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import partial, reduce
from typing import Any

import jax
from jax import numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from megalodon_jax.modules.matmul import (
    GATHERED,
    WEIGHT,
    LogicalAxes,
    contract,
)
from megalodon_jax.parallel.sharding import (
    RULES,
    axis_size,
    partition_spec,
    shard_map_logical,
    weight_axes,
)
from megalodon_jax.typing import Array, Float

_AXIS = "model"


def is_column_parallel(axes: LogicalAxes, num_axes: int) -> bool:
    """Whether kernels with these axes have their columns on several devices.

    Args:
      axes: logical names of the kernel's axes.
      num_axes: of the input; other inputs than (B, L, D) are left to the compiler.
    """
    return num_axes == 3 and axes[0] == "embed" and _is_sharded(axes[1])


def is_row_parallel(axes: LogicalAxes, num_axes: int) -> bool:
    """Whether kernels with these axes have their rows on several devices; see above."""
    return num_axes == 3 and axes[1] == "embed" and _is_sharded(axes[0])


def _is_sharded(name: str | None) -> bool:
    return axis_size(_AXIS) > 1 and name is not None and _AXIS in RULES[name]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def column_parallel_matmul(
    x: Float[Array, "B L D"],
    kernels: tuple[Float[Array, "D out"], ...],
    dtype: DTypeLike,
    axes: tuple[LogicalAxes, ...],
    reduce_dtype: DTypeLike,
) -> tuple[Float[Array, "B L out"], ...]:
    """x @ kernel for every kernel, in `dtype`: from sharded channels to sharded columns.

    All kernels share one exchange of x, and one of its gradient.

    Args:
      x: features, sharded by channels.
      kernels: weights.
      dtype: of operands, results and partial sums; products accumulate in float32.
      axes: logical names of the axes of every kernel.
      reduce_dtype: in which devices sum their gradients of the weights.
    """
    return _column_forward(x, kernels, dtype, axes, reduce_dtype)[0]


def _column_forward(
    x: Array,
    kernels: tuple[Array, ...],
    dtype: DTypeLike,
    axes: tuple[LogicalAxes, ...],
    reduce_dtype: DTypeLike,
):
    del reduce_dtype
    x_cast = x.astype(dtype)
    receive = _over_mesh(_receive_shards, (_FEATURES,), (_FEATURES,) * (axis_size(_AXIS) - 1))
    shards = (x_cast, *checkpoint_name(receive(x_cast), GATHERED))
    cast = checkpoint_name(tuple(kernel.astype(dtype) for kernel in kernels), WEIGHT)

    def multiply(shards: tuple[Array, ...], kernels: tuple[Array, ...]) -> tuple[Array, ...]:
        kernels = tuple(map(_gather, kernels, axes))

        def multiply_shard(shift: int, shard: Array) -> tuple[Array, ...]:
            blocks = (channel_block(kernel, -shift, axis=0) for kernel in kernels)
            return tuple(contract(shard, block, _FORWARD, dtype) for block in blocks)

        return _accumulate(shards, multiply_shard)

    products = _over_mesh(
        multiply,
        ((_FEATURES,) * len(shards), axes),
        tuple(("batch", "length", a[1]) for a in axes),
    )(shards, cast)
    # Empty arrays carry the operands' own dtypes to the backward pass.
    dtypes = jax.tree.map(lambda a: jnp.zeros((0,), a.dtype), (x, kernels))
    return products, (shards, cast, dtypes)


def _column_backward(
    dtype: DTypeLike,
    axes: tuple[LogicalAxes, ...],
    reduce_dtype: DTypeLike,
    residuals: Any,
    dys: tuple[Array, ...],
):
    shards, kernels, (like_x, like_kernels) = residuals
    outputs = tuple(("batch", "length", a[1]) for a in axes)

    def differentiate(shards, kernels, dys):
        kernels = tuple(map(_gather, kernels, axes))

        def dx_term(shift: int) -> Array:
            return sum_terms(
                contract(dy, channel_block(kernel, shift, axis=0), _BACKWARD, dtype)
                for dy, kernel in zip(dys, kernels, strict=True)
            )

        def dkernel(dy: Array) -> Array:
            blocks = [contract(shard, dy, _TOKENS, _sum_dtype(reduce_dtype)) for shard in shards]
            return _reduce(_in_order(blocks))

        return _scatter_sum(dx_term, dtype), tuple(map(dkernel, dys))

    dx, dkernels = _over_mesh(
        differentiate,
        ((_FEATURES,) * len(shards), axes, outputs),
        (_FEATURES, axes),
    )(shards, kernels, dys)
    dkernels = tuple(d.astype(like.dtype) for d, like in zip(dkernels, like_kernels, strict=True))
    return dx.astype(like_x.dtype), dkernels


column_parallel_matmul.defvjp(_column_forward, _column_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def row_parallel_matmul(
    h: Float[Array, "B L in"],
    kernel: Float[Array, "in D"],
    dtype: DTypeLike,
    axes: LogicalAxes,
    reduce_dtype: DTypeLike,
) -> Float[Array, "B L D"]:
    """h @ kernel in `dtype`: from sharded rows of the kernel to sharded channels.

    Args:
      h: features, sharded like the rows of the kernel.
      kernel: weights.
      dtype: of operands, result and terms that devices send; products accumulate in float32.
      axes: logical names of the kernel's axes.
      reduce_dtype: in which devices sum their gradients of the weights.
    """
    return _row_forward(h, kernel, dtype, axes, reduce_dtype)[0]


def _row_forward(
    h: Array, kernel: Array, dtype: DTypeLike, axes: LogicalAxes, reduce_dtype: DTypeLike
):
    del reduce_dtype
    h_cast, cast = h.astype(dtype), checkpoint_name(kernel.astype(dtype), WEIGHT)

    def multiply(h: Array, kernel: Array) -> Array:
        kernel = _gather(kernel, axes)

        def term(shift: int) -> Array:
            return contract(h, channel_block(kernel, shift, axis=1), _FORWARD, dtype)

        return _scatter_sum(term, dtype)

    hidden = ("batch", "length", axes[0])
    y = _over_mesh(multiply, (hidden, axes), _FEATURES)(h_cast, cast)
    dtypes = jax.tree.map(lambda a: jnp.zeros((0,), a.dtype), (h, kernel))
    return y, (h_cast, cast, dtypes)


def _row_backward(
    dtype: DTypeLike, axes: LogicalAxes, reduce_dtype: DTypeLike, residuals: Any, dy: Array
):
    h, kernel, (like_h, like_kernel) = residuals
    hidden = ("batch", "length", axes[0])

    def differentiate(h: Array, kernel: Array, dy: Array) -> tuple[Array, Array]:
        kernel = _gather(kernel, axes)
        shards = (dy, *_receive_shards(dy))

        def multiply_shard(shift: int, shard: Array) -> tuple[Array]:
            block = channel_block(kernel, -shift, axis=1)
            return (contract(shard, block, _BACKWARD, dtype),)

        (dh,) = _accumulate(shards, multiply_shard)
        # The transposed gradient: devices then sum contiguous rows.
        blocks = [contract(shard, h, _TOKENS, _sum_dtype(reduce_dtype)) for shard in shards]
        return dh, _reduce(_in_order(blocks))

    dh, transposed = _over_mesh(differentiate, (hidden, axes, _FEATURES), (hidden, axes[::-1]))(
        h, kernel, dy
    )
    return dh.astype(like_h.dtype), transposed.T.astype(like_kernel.dtype)


row_parallel_matmul.defvjp(_row_forward, _row_backward)

_FEATURES = ("batch", "length", "channels")
# Contracted axes: features with rows, features with columns, tokens with tokens.
_FORWARD, _BACKWARD, _TOKENS = ((2,), (0,)), ((2,), (1,)), ((0, 1), (0, 1))


def _gather(kernel: Array, axes: LogicalAxes) -> Array:
    """A kernel that FSDP shards along the axis of the residual stream, whole along that axis."""
    if not (over := weight_axes()):
        return kernel
    return jax.lax.all_gather(kernel, over, axis=axes.index("embed"), tiled=True)


def _over_mesh(function: Callable[..., Any], in_axes: Any, out_axes: Any) -> Callable[..., Any]:
    """`shard_map` with trees of logical axes; a leaf is a tuple of names."""

    def specs(axes: Any) -> Any:
        return jax.tree.map(lambda names: partition_spec(*names), axes, is_leaf=_is_names)

    return shard_map_logical(function, in_specs=specs(in_axes), out_specs=specs(out_axes))


def _is_names(axes: Any) -> bool:
    return bool(axes) and all(name is None or isinstance(name, str) for name in axes)


def _receive_shards(x: Array) -> tuple[Array, ...]:
    """The shards of the other devices; the first one is that of the device before this one."""
    return tuple(send(x, shift) for shift in range(1, axis_size(_AXIS)))


def send(x: Array, shift: int) -> Array:
    """Sends x to the device `shift` places on, and returns what this device receives."""
    size = axis_size(_AXIS)
    if shift == 0:
        return x
    return jax.lax.ppermute(x, _AXIS, [(i, (i + shift) % size) for i in range(size)])


def channel_block(kernel: Array, shift: int, *, axis: int) -> Array:
    """The part of a kernel that belongs to the channels of the device `shift` places on."""
    size = axis_size(_AXIS)
    width = kernel.shape[axis] // size
    index = (jax.lax.axis_index(_AXIS) + shift) % size
    return jax.lax.dynamic_slice_in_dim(kernel, index * width, width, axis)


def _scatter_sum(term: Callable[[int], Array], dtype: DTypeLike) -> Array:
    """Sum over devices of `term(shift)`, each device's result for the device `shift` places on."""
    received = [send(term(shift), shift) for shift in range(1, axis_size(_AXIS))]
    # Without the barrier the compiler adds a received term inside the last product, which then
    # waits for it.
    terms = (jax.lax.optimization_barrier(term(0)), *received)
    wide = jnp.promote_types(dtype, jnp.float32)
    return sum_terms(each.astype(wide) for each in terms).astype(dtype)


def _in_order(blocks: Sequence[Array]) -> Array:
    """Blocks of the device itself, the one before it, and so on, as rows of one array in order."""
    width = blocks[0].shape[0]
    rows = jnp.concatenate(blocks[::-1])
    return jnp.roll(rows, (jax.lax.axis_index(_AXIS) + 1) * width, axis=0)


def _reduce(gradient: Array) -> Array:
    """Sum over the devices that share a kernel; FSDP leaves each device its rows."""
    if over := weight_axes():
        gradient = jax.lax.psum_scatter(gradient, over, scatter_dimension=0, tiled=True)
    return jax.lax.psum(gradient, "replica") if axis_size("replica") > 1 else gradient


def _sum_dtype(reduce_dtype: DTypeLike) -> DTypeLike:
    """The dtype of a weight gradient: float32 where no devices sum it."""
    return reduce_dtype if weight_axes() or axis_size("replica") > 1 else jnp.float32


def sum_terms(terms: Iterable[Array]) -> Array:
    """Sum from the left, without the zero of `sum`."""
    return reduce(operator.add, terms)


def _accumulate(
    shards: Sequence[Array], products: Callable[[int, Array], tuple[Array, ...]]
) -> tuple[Array, ...]:
    """Sums over shards of `products(shift, shard)`; the first shard is the device's own.

    All products with one shard are computed before the next shard is read. Without the barrier the
    compiler reorders the sums, or delays products that could hide the exchange.
    """
    totals = products(0, shards[0])
    for shift, shard in enumerate(shards[1:], start=1):
        totals, shard = jax.lax.optimization_barrier((totals, shard))
        totals = tuple(map(operator.add, totals, products(shift, shard)))
    return totals
