"""Chunk attention on TPU: checks, sizes of a call, padding to blocks, and the custom gradient."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.chunk_attention.intervals import attend_intervals, pad_length
from pallas_kernels.chunk_attention.pallas_tpu.block_sizes import (
    INTERPRETED_BLOCKS,
    LANES,
    SMALLEST_BLOCK,
    HeadSizes,
    find_blocks,
    round_up,
)
from pallas_kernels.chunk_attention.pallas_tpu.kernels import AttentionTpuPlan
from pallas_kernels.chunk_attention.pallas_tpu.launch import attend_backward, attend_forward
from pallas_kernels.chunk_attention.types import (
    AttentionDropout,
    ChunkAttentionOutput,
    KeyValueCache,
)
from pallas_kernels.common.residuals import name_residuals
from pallas_kernels.common.target import check_tpu, is_interpreted


def chunk_attention(
    q: Float[Array, "B L H Dk"],
    k: Float[Array, "B L H Dk"],
    v: Float[Array, "B L H Dv"],
    chunk_size: int,
    positions: Int32[Array, "B L"] | None,
    segment_ids: Int32[Array, "B L"] | None,
    cache: KeyValueCache | None,
    dropout: AttentionDropout | None,
) -> ChunkAttentionOutput:
    """Attention by Pallas kernels for TPU. Arguments as in `api.chunk_attention`.

    Raises:
      ValueError: dropout, float64, no TPU or an unknown one, or heads and chunks whose blocks do
        not fit into its memory.
    """
    if dropout is not None and dropout.rate > 0:
        raise ValueError(
            f"pallas_tpu has no dropout and dropout.rate is {dropout.rate}; use implementation "
            "'xla', or None, which takes it"
        )
    for name, value in {"q": q, "v": v}.items():
        if value.dtype == jnp.float64:
            raise ValueError(
                f"{name} is float64, which TPUs lack; use implementation 'xla' or 'reference'"
            )
    plan = _make_plan(q, v, chunk_size, is_aligned=positions is None, has_cache=cache is not None)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.int32), q.shape[:2])
    return attend_intervals(
        partial(_attend_row, plan),
        q,
        k,
        v,
        chunk_size=chunk_size,
        positions=positions,
        segment_ids=segment_ids,
        cache=cache,
        key_offset=plan.key_offset,
        zero_padding=True,
    )


def can_run(
    q: Float[Array, "B L H Dk"],
    v: Float[Array, "B L H Dv"],
    chunk_size: int,
    device_kind: str,
) -> bool:
    """Whether blocks for these shapes fit into the memory of a TPU in `block_sizes.BLOCKS`."""
    return find_blocks(device_kind, _head_sizes(q, v), chunk_size) is not None


def _head_sizes(q: Array, v: Array) -> HeadSizes:
    return HeadSizes(
        key_width=round_up(q.shape[3], LANES),
        value_width=round_up(v.shape[3], LANES),
        key_bytes=q.dtype.itemsize,
        value_bytes=v.dtype.itemsize,
    )


def _make_plan(
    q: Array, v: Array, chunk_size: int, *, is_aligned: bool, has_cache: bool
) -> AttentionTpuPlan:
    interpret = is_interpreted()
    heads = _head_sizes(q, v)
    if interpret:
        blocks = INTERPRETED_BLOCKS
    else:
        kind = check_tpu("pallas_tpu")
        blocks = find_blocks(kind, heads, chunk_size)
        if blocks is None:
            raise ValueError(
                f"heads of {q.shape[3]} and {v.shape[3]} channels ({q.dtype}, {v.dtype}) in chunks "
                f"of {chunk_size} tokens do not fit into the memory of {kind}; use "
                "implementation 'xla'"
            )
    # Smaller blocks for short rows and chunks, which would leave most of a block empty.
    while max(blocks[:3]) > max(SMALLEST_BLOCK, min(q.shape[1], chunk_size)):
        blocks = blocks.halved()
    largest = max(blocks[:3])
    return AttentionTpuPlan(
        heads=q.shape[2],
        key_width=heads.key_width,
        value_width=heads.value_width,
        chunk_size=chunk_size,
        is_aligned=is_aligned,
        key_offset=round_up(chunk_size, largest) if has_cache else 0,
        length=round_up(q.shape[1], largest),
        blocks=blocks,
        interpret=interpret,
    )


def _attend_row(
    plan: AttentionTpuPlan,
    q: Float[Array, "B L H Dk"],
    k: Float[Array, "B M H Dk"],
    v: Float[Array, "B M H Dv"],
    start: Int32[Array, "B L"],
) -> Float[Array, "B L H Dv"]:
    B, L, value_width = q.shape[0], q.shape[1], v.shape[3]
    after = plan.length - L
    # Padding after the row sees no key.
    beyond = plan.key_offset + plan.length
    start = jnp.pad(start, ((0, 0), (0, after)), constant_values=beyond)
    q, k, v = (pad_length(x, 0, after) for x in (q, k, v))
    q, k = (_join_heads(x, plan.key_width) for x in (q, k))
    out = _attend(plan, q, k, _join_heads(v, plan.value_width), start)
    out = out.reshape(B, plan.length, plan.heads, plan.value_width)
    return out[:, :L, :, :value_width]


def _join_heads(x: Float[Array, "B L H D"], width: int) -> Float[Array, "B L H*W"]:
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[3])))
    return x.reshape(*x.shape[:2], -1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: AttentionTpuPlan, q, k, v, start):
    return attend_forward(plan, q, k, v, start)[0]


def _attend_forward(plan: AttentionTpuPlan, q, k, v, start):
    out, lse = name_residuals(attend_forward(plan, q, k, v, start), "chunk_attention")
    return out, (q, k, v, start, out, lse)


def _attend_backward(plan: AttentionTpuPlan, residuals, do):
    q, k, v, start, out, lse = residuals
    # Head by head: for a (B, L, H, Dv) array XLA would copy the product to another layout.
    delta = jnp.stack(
        [
            jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32), axis=2)
            for a, b in zip(
                jnp.split(out, plan.heads, axis=2), jnp.split(do, plan.heads, axis=2), strict=True
            )
        ],
        axis=1,
    )[:, :, None]
    return *attend_backward(plan, q, k, v, start, lse, delta, do), None


_attend.defvjp(_attend_forward, _attend_backward)
