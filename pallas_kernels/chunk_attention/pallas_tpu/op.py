"""Chunk attention on TPU: one kernel forward and one backward, over blocks of a row."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.chunk_attention.intervals import (
    align_right,
    interval_starts,
    next_cache,
    pad_length,
)
from pallas_kernels.chunk_attention.pallas_tpu.block_sizes import (
    SMALLEST_BLOCK,
    TpuBlocks,
    blocks_for,
)
from pallas_kernels.chunk_attention.pallas_tpu.kernels import Plan, attend_backward, attend_forward
from pallas_kernels.chunk_attention.types import (
    AttentionDropout,
    ChunkAttentionOutput,
    KeyValueCache,
)
from pallas_kernels.common.residuals import name_residuals
from pallas_kernels.common.target import check_tpu, is_interpreted

_LANES = 128


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
    B, L = q.shape[:2]
    plan = _make_plan(q, v, chunk_size, aligned=positions is None, cached=cache is not None)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (B, L))
    held = jnp.zeros((B, 1), jnp.int32) if cache is None else positions[:, :1] % chunk_size
    start = interval_starts(positions, segment_ids, chunk_size, plan.left, held)

    tokens = None
    if segment_ids is not None:
        # Padding meets tokens in the kernels' products, and 0 times a NaN is a NaN.
        tokens = (segment_ids != 0)[:, :, None, None]
        q, k, v = (jnp.where(tokens, x, 0) for x in (q, k, v))
    k_row, v_row = k, v
    if cache is not None:
        k_row = jnp.concatenate([align_right(cache.key, held), k], axis=1)
        v_row = jnp.concatenate([align_right(cache.value, held), v], axis=1)
    before = plan.left - (k_row.shape[1] - L)
    k_all, v_all = (jnp.pad(x, ((0, 0), (before, 0), (0, 0), (0, 0))) for x in (k_row, v_row))
    total = plan.left + plan.length
    start = jnp.pad(start, ((0, 0), (0, plan.length - L)), constant_values=total)
    out = _attend(
        plan,
        _join_heads(pad_length(q, plan.length), plan.key_width),
        _join_heads(pad_length(k_all, total), plan.key_width),
        _join_heads(pad_length(v_all, total), plan.value_width),
        start,
    )
    out = out.reshape(B, plan.length, plan.heads, plan.value_width)[:, :L, :, : v.shape[3]]
    if tokens is not None:
        out = jnp.where(tokens, out, 0)
    if cache is not None:
        cache = next_cache(k_row, v_row, chunk_size, positions, segment_ids, cache)
    return ChunkAttentionOutput(out, cache)


def can_run(
    q: Float[Array, "B L H Dk"],
    v: Float[Array, "B L H Dv"],
    chunk_size: int,
    device_kind: str,
) -> bool:
    """Whether blocks for these shapes fit into the memory of a TPU in `tpu_block_sizes.BLOCKS`."""
    widths = _round_up(q.shape[3], _LANES), _round_up(v.shape[3], _LANES)
    blocks = _fit(blocks_for(device_kind), widths, chunk_size, q.dtype.itemsize, v.dtype.itemsize)
    return blocks is not None


def _make_plan(q: Array, v: Array, chunk_size: int, *, aligned: bool, cached: bool) -> Plan:
    interpret = is_interpreted()
    widths = _round_up(q.shape[3], _LANES), _round_up(v.shape[3], _LANES)
    if interpret:
        blocks = blocks_for(None)
    else:
        kind = check_tpu("pallas_tpu")
        table = blocks_for(kind)
        blocks = _fit(table, widths, chunk_size, q.dtype.itemsize, v.dtype.itemsize)
        if blocks is None:
            raise ValueError(
                f"heads of {q.shape[3]} and {v.shape[3]} channels ({q.dtype}, {v.dtype}) in chunks "
                f"of {chunk_size} tokens do not fit into the memory of {kind}; use "
                "implementation 'xla'"
            )
    # A short row or chunk needs no block that is mostly empty.
    while max(blocks[:3]) > max(SMALLEST_BLOCK, min(q.shape[1], chunk_size)):
        blocks = blocks.halved()
    largest = max(blocks[:3])
    return Plan(
        heads=q.shape[2],
        key_width=widths[0],
        value_width=widths[1],
        chunk_size=chunk_size,
        aligned=aligned,
        left=_round_up(chunk_size, largest) if cached else 0,
        length=_round_up(q.shape[1], largest),
        blocks=blocks,
        interpret=interpret,
    )


def _fit(
    blocks: TpuBlocks, widths: tuple[int, int], chunk_size: int, q_bytes: int, v_bytes: int
) -> TpuBlocks | None:
    """The largest blocks up to `blocks` that fit; None if none do."""
    while (
        _backward_bytes(blocks.backward, widths, chunk_size, q_bytes, v_bytes) > (blocks.vmem_limit)
        or _forward_bytes(blocks, widths, q_bytes, v_bytes) > blocks.vmem_limit
    ):
        if blocks == blocks.halved():
            return None
        blocks = blocks.halved()
    return blocks


def _forward_bytes(blocks: TpuBlocks, widths: tuple[int, int], q_bytes: int, v_bytes: int) -> int:
    """Of arrays that come and go, in two buffers; of sums and columns; of scores and products."""
    Dk, Dv = widths
    moved = (blocks.queries + blocks.keys) * (Dk * q_bytes + Dv * v_bytes)
    kept = blocks.queries * (Dv + 3 * _LANES) * 4
    return 2 * moved + kept + blocks.queries * (3 * blocks.keys + Dv) * 4


def _backward_bytes(
    size: int, widths: tuple[int, int], chunk_size: int, q_bytes: int, v_bytes: int
) -> int:
    Dk, Dv = widths
    moved = size * (4 * Dk * q_bytes + 3 * Dv * v_bytes)
    kept = (_round_up(chunk_size, size) + 2 * size) * Dk * 4 + size * Dv * 4
    return 2 * moved + kept + size * (5 * size + Dv) * 4


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _join_heads(x: Float[Array, "B L H D"], width: int) -> Float[Array, "B L H*W"]:
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[3])))
    return x.reshape(*x.shape[:2], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, q, k, v, start):
    return attend_forward(plan, q, k, v, start)[0]


def _attend_forward(plan: Plan, q, k, v, start):
    out, lse = name_residuals(attend_forward(plan, q, k, v, start), "chunk_attention")
    return out, (q, k, v, start, out, lse)


def _attend_backward(plan: Plan, residuals, d_out):
    q, k, v, start, out, lse = residuals
    # Head by head: as a (B, L, H, Dv) array, XLA would lay the product out anew in memory.
    mean = jnp.stack(
        [
            jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32), axis=2)
            for a, b in zip(
                jnp.split(out, plan.heads, axis=2),
                jnp.split(d_out, plan.heads, axis=2),
                strict=True,
            )
        ],
        axis=1,
    )[:, :, None]
    return *attend_backward(plan, q, k, v, start, lse, mean, d_out), None


_attend.defvjp(_attend_forward, _attend_backward)
