"""Chunk attention by Triton: checks, the intervals of keys, and the custom gradient."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.chunk_attention.context_parallel import KeysInReach
from pallas_kernels.chunk_attention.intervals import (
    attend_intervals,
    noncausal_intervals,
    zero_unless,
)
from pallas_kernels.chunk_attention.triton.block_sizes import MAX_KEY_WIDTH
from pallas_kernels.chunk_attention.triton.launch import (
    Intervals,
    Operands,
    OutputGradient,
    launch_forward,
    launch_key_and_value_gradients,
    launch_query_gradient,
)
from pallas_kernels.chunk_attention.types import (
    AttentionDropout,
    ChunkAttentionOutput,
    KeyValueCache,
)
from pallas_kernels.common.residuals import name_residuals
from pallas_kernels.common.target import is_interpreted
from pallas_kernels.common.triton import check_triton

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


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
    """Attention by Triton kernels. Arguments as in `api.chunk_attention`.

    Raises:
      ValueError: float64, key heads wider than 256, dropout, no GPU or one older than Ampere, or
        triton or jax-triton is not installed.
    """
    _check(q, v, dropout)
    if positions is None:
        index = jnp.arange(q.shape[1], dtype=jnp.int32)
        start = jnp.broadcast_to(index - index % chunk_size, q.shape[:2])
        return ChunkAttentionOutput(_attend_causal(q, k, v, start), None)
    return attend_intervals(
        _attend_causal,
        q,
        k,
        v,
        chunk_size=chunk_size,
        positions=positions,
        segment_ids=segment_ids,
        cache=cache,
        key_offset=0 if cache is None else chunk_size,
        zero_padding=True,
    )


def noncausal_attention(
    q: Float[Array, "B L H Dk"],
    keys: KeysInReach,
    chunk_size: int | None,
    positions: Int32[Array, "B L"] | None,
    segment_ids: Int32[Array, "B L"] | None,
    dropout: AttentionDropout | None,
) -> Float[Array, "B L H Dv"]:
    """Attention by Triton kernels. Arguments as in `reference.noncausal_attention`.

    Raises:
      ValueError: as `chunk_attention`.
    """
    del positions  # those of the keys tell the chunks
    _check(q, keys.value, dropout)
    intervals = Intervals(*noncausal_intervals(keys, chunk_size, q.shape[1]))
    k, v = keys.key, keys.value
    if segment_ids is None or keys.segment_ids is None:
        return _attend(is_interpreted(), q, k, v, intervals)
    # Weights of zero meet padding, and 0 times NaN is NaN.
    is_query = (segment_ids != 0)[:, :, None, None]
    is_key = (keys.segment_ids != 0)[:, :, None, None]
    q, k, v = zero_unless(is_query, q), zero_unless(is_key, k), zero_unless(is_key, v)
    return zero_unless(is_query, _attend(is_interpreted(), q, k, v, intervals))


def can_run(q: Array, v: Array, dropout: AttentionDropout | None) -> bool:
    """Whether the kernels take these operands."""
    return _find_obstacle(q, v, dropout) is None


def _find_obstacle(q: Array, v: Array, dropout: AttentionDropout | None) -> str | None:
    for name, x in {"q": q, "v": v}.items():
        if x.dtype not in _DTYPES:
            return f"triton takes float32, bfloat16 and float16, {name} is {x.dtype}"
    if q.shape[3] > MAX_KEY_WIDTH:
        return f"triton takes key heads at most {MAX_KEY_WIDTH} wide, q's are {q.shape[3]}"
    if dropout is not None and dropout.rate > 0:
        return f"triton has no attention dropout and dropout.rate is {dropout.rate}"
    return None


def _check(q: Array, v: Array, dropout: AttentionDropout | None) -> None:
    check_triton("triton")
    obstacle = _find_obstacle(q, v, dropout)
    if obstacle is not None:
        raise ValueError(f"{obstacle}; use implementation 'xla', or None, which takes it")


def _attend_causal(q: Array, k: Array, v: Array, start: Int32[Array, "B L"]) -> Array:
    """Attention of query t to the keys from start[t] to its own; the last L keys are the row's."""
    own_key = k.shape[1] - q.shape[1] + jnp.arange(q.shape[1], dtype=jnp.int32)
    stop = jnp.broadcast_to(own_key + 1, start.shape)
    return _attend(is_interpreted(), q, k, v, Intervals(start, stop))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(interpret: bool, q: Array, k: Array, v: Array, intervals: Intervals) -> Array:
    return _attend_forward(interpret, q, k, v, intervals)[0]


def _attend_forward(interpret, q, k, v, intervals):
    operands = Operands(q, k, v, intervals)
    out, lse = name_residuals(launch_forward(operands, interpret=interpret), "chunk_attention")
    return out, (operands, out, lse)


def _attend_backward(interpret, residuals, do):
    operands, out, lse = residuals
    delta = jnp.sum(do.astype(jnp.float32) * out.astype(jnp.float32), axis=3)
    gradient = OutputGradient(do, lse, jnp.swapaxes(delta, 1, 2))
    dq = launch_query_gradient(operands, gradient, interpret=interpret)
    dk, dv = launch_key_and_value_gradients(operands, gradient, interpret=interpret)
    return dq, dk, dv, None


_attend.defvjp(_attend_forward, _attend_backward)
