"""The public function of chunk attention: check, choose an implementation, call it."""

from collections.abc import Callable
from typing import get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.chunk_attention import context_parallel, noncausal, reference, xla
from pallas_kernels.chunk_attention.mosaic_gpu import op as mosaic_gpu
from pallas_kernels.chunk_attention.pallas_tpu import op as pallas_tpu
from pallas_kernels.chunk_attention.pallas_tpu.block_sizes import (
    SHORTEST_LENGTH,
    TPUS_FASTER_THAN_XLA,
)
from pallas_kernels.chunk_attention.quantized_cache import next_quantized_cache
from pallas_kernels.chunk_attention.triton import op as triton
from pallas_kernels.chunk_attention.types import (
    AttentionDropout,
    ChunkAttentionOutput,
    DropoutMode,
    KeyValueCache,
    check_scales,
)
from pallas_kernels.common.dispatch import Implementation, check_implementation
from pallas_kernels.common.measured_choice import find_measured
from pallas_kernels.common.symbolic import has_symbolic_shape
from pallas_kernels.common.target import find_target

# All called as f(q, k, v, chunk_size, positions, segment_ids, cache, dropout).
IMPLEMENTATIONS: dict[str, Callable[..., ChunkAttentionOutput]] = {
    "reference": reference.chunk_attention,
    "xla": xla.chunk_attention,
    "mosaic_gpu": mosaic_gpu.chunk_attention,
    "pallas_tpu": pallas_tpu.chunk_attention,
    "triton": triton.chunk_attention,
}

# All called as f(q, keys, chunk_size, positions, segment_ids, dropout).
NONCAUSAL_IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {
    "reference": reference.noncausal_attention,
    "xla": noncausal.noncausal_attention,
    "triton": triton.noncausal_attention,
}
# A chunk that no document fills.
_UNBOUNDED = 1 << 30


def chunk_attention(
    q: Float[Array, "B L H Dk"],
    k: Float[Array, "B L H Dk"],
    v: Float[Array, "B L H Dv"],
    *,
    chunk_size: int | None,
    causal: bool = True,
    positions: Int32[Array, "B L"] | None = None,
    segment_ids: Int32[Array, "B L"] | None = None,
    cache: KeyValueCache | None = None,
    dropout: AttentionDropout | None = None,
    implementation: Implementation | None = None,
    sequence_axis: str | None = None,
) -> ChunkAttentionOutput:
    """Softmax attention inside chunks: o[t] = Σ_s softmax_s(q[t]·k[s]) v[s].

    s runs over the tokens of t's document and chunk up to t, or over all of them if not `causal`
    (encoders, Ma et al. 2024, appendix C); a token's chunk is position // C. The scores are not
    scaled (section 3.3, as released: the scale is in q). The softmax is float32 (float64 for
    float64 operands).

    Args:
      q: queries after RoPE.
      k: keys after RoPE.
      v: values.
      chunk_size: tokens C in a chunk, at least 1. None: no chunks, a token sees its document.
      causal: whether a token sees the tokens up to itself only.
      positions: each token's position in its document, consecutive inside a document. None: 0..L-1
        in every row, which needs no mask per token; only without segment_ids and cache. Non-causal
        rows may have segment_ids without positions, where documents begin at multiples of C: then
        a chunk has C keys, and with positions 3C.
      segment_ids: documents of a row numbered 1, 2, ...; a document's tokens are contiguous. 0 is
        padding: its output is 0, and its k and v are ignored. None: one document, no padding. With
        a cache, padding comes only after a row's tokens.
      cache: tokens of the current chunk before the row's first token, whose position is
        positions[:, 0]. Only the row's first document sees them. With `Int8Slots` the row's tokens
        see each other's exact keys and values, and the rounded ones of the tokens before them; the
        next cache has theirs rounded. Implementations get a copy in the dtype of k and v.
      dropout: attention dropout; None: no dropout.
      implementation: "reference" (dense, L x (C + L) scores), "xla" (blocks, any platform),
        "mosaic_gpu" (kernels for NVIDIA Hopper; bfloat16, no dropout, the default there from 512
        tokens on), "pallas_tpu" (kernels for TPU; no dropout), "triton" (kernels for NVIDIA GPUs
        from Ampere on, extra `triton`; no dropout), or None for the fastest known here. Non-causal
        attention and attention without chunks have "reference", "xla" and "triton".
      sequence_axis: inside `jax.shard_map`, the mesh axis over which the sequence is sharded
        (context parallelism); without positions every shard must hold whole chunks.

    Returns:
      The outputs, and the next cache if there is one. A row of padding keeps its cache.

    Raises:
      ValueError: shapes or dtypes do not fit together, positions are missing, the implementation
        does not exist or cannot run these operands on this device; a cache without causality or
        chunks, or causal attention without chunks in sequence shards.
    """
    _check_operands(q, k, v, chunk_size)
    check_implementation("chunk attention", implementation, IMPLEMENTATIONS)
    if not causal or chunk_size is None:
        _check_encoder_call(causal, chunk_size, cache, implementation, sequence_axis)
        implementation = implementation or _choose_for_encoder(q, v, dropout)
    if not causal:
        assert implementation is not None
        return _noncausal(
            q, k, v, chunk_size, positions, segment_ids, dropout, implementation, sequence_axis
        )
    _check_rows(q, positions, segment_ids, cache is not None)
    chunk_size = _UNBOUNDED if chunk_size is None else chunk_size
    if sequence_axis is not None:
        cache = context_parallel.incoming_cache(
            k, v, chunk_size=chunk_size, positions=positions, cache=cache, axis=sequence_axis
        )
    if cache is not None:
        _check_cache(cache, k, v, chunk_size)
    if dropout is not None:
        _check_dropout(dropout)
    name = implementation or _choose_implementation(q, v, chunk_size, dropout)
    decoded = None if cache is None else cache.decode(k.dtype, v.dtype)
    out = IMPLEMENTATIONS[name](q, k, v, chunk_size, positions, segment_ids, decoded, dropout)
    if cache is not None and cache.is_quantized:
        assert positions is not None
        assert out.cache is not None
        rounded = next_quantized_cache(
            out.cache, cache, positions=positions, segment_ids=segment_ids
        )
        out = out._replace(cache=rounded)
    # A sequence shard's cache is not the row's.
    return out if sequence_axis is None else out._replace(cache=None)


def _noncausal(
    q: Array,
    k: Array,
    v: Array,
    chunk_size: int | None,
    positions: Array | None,
    segment_ids: Array | None,
    dropout: AttentionDropout | None,
    implementation: str,
    sequence_axis: str | None,
) -> ChunkAttentionOutput:
    _check_row_shapes(q, positions, segment_ids)
    if dropout is not None:
        _check_dropout(dropout)
    keys = context_parallel.keys_in_reach(
        k,
        v,
        chunk_size=chunk_size,
        positions=positions,
        segment_ids=segment_ids,
        axis=sequence_axis,
    )
    if keys.segment_ids is not None and segment_ids is None:
        segment_ids = jnp.ones(q.shape[:2], jnp.int32)
    attend = NONCAUSAL_IMPLEMENTATIONS[implementation]
    return ChunkAttentionOutput(attend(q, keys, chunk_size, positions, segment_ids, dropout), None)


def _choose_implementation(
    q: Array, v: Array, chunk_size: int, dropout: AttentionDropout | None
) -> Implementation:
    """The fastest by measurement (Hopper) and by the TPU compiler's estimates (README.md).

    Before them comes `xla` or `triton`, if `megalodon tune` measured it on the user's device.
    """
    if has_symbolic_shape(q):
        return "xla"
    dtypes, target = {q.dtype, v.dtype}, find_target()
    measured = find_measured("chunk_attention", v, tokens=q.shape[0] * q.shape[1])
    if measured == "xla" or (measured == "triton" and triton.can_run(q, v, dropout)):
        return measured
    if (
        target.is_hopper
        and q.shape[1] >= mosaic_gpu.SHORTEST_LENGTH
        and mosaic_gpu.can_run(q, v, dropout)
    ):
        return "mosaic_gpu"
    if (
        target.kind in TPUS_FASTER_THAN_XLA
        and q.shape[1] >= SHORTEST_LENGTH
        and jnp.dtype(jnp.float64) not in dtypes
        and (dropout is None or dropout.rate == 0)
        and pallas_tpu.can_run(q, v, chunk_size, target.kind)
    ):
        return "pallas_tpu"
    return "xla"


def _choose_for_encoder(q: Array, v: Array, dropout: AttentionDropout | None) -> Implementation:
    """`xla`, unless `megalodon tune` found Triton's kernels to be faster on the user's device."""
    if has_symbolic_shape(q):
        return "xla"
    measured = find_measured("noncausal_attention", v, tokens=q.shape[0] * q.shape[1])
    return "triton" if measured == "triton" and triton.can_run(q, v, dropout) else "xla"


def _check_encoder_call(
    causal: bool,
    chunk_size: int | None,
    cache: KeyValueCache | None,
    implementation: str | None,
    sequence_axis: str | None,
) -> None:
    what = "non-causal attention" if not causal else "attention without chunks"
    if implementation not in (None, *NONCAUSAL_IMPLEMENTATIONS):
        raise ValueError(
            f"{what} has no implementation {implementation!r}, whose kernels are causal and "
            f"chunked; use one of {', '.join(map(repr, NONCAUSAL_IMPLEMENTATIONS))} or None"
        )
    if cache is not None:
        raise ValueError(f"{what} has no cache: a cache holds one chunk before; pass cache=None")
    if causal and sequence_axis is not None:
        raise ValueError(
            "causal attention without chunks needs whole rows, and sequence_axis is "
            f"{sequence_axis!r}; set chunk_size, or shard the rows"
        )


def _check_operands(q: Array, k: Array, v: Array, chunk_size: int | None) -> None:
    if q.ndim != 4 or q.shape != k.shape or v.ndim != 4 or q.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"q, k, v have shapes {q.shape}, {k.shape}, {v.shape}; "
            "expected (B, L, H, Dk), (B, L, H, Dk), (B, L, H, Dv)"
        )
    if q.shape[1] < 1:
        raise ValueError(f"q has shape {q.shape}: a row needs at least one token")
    if q.dtype != k.dtype:
        raise ValueError(f"q and k are {q.dtype} and {k.dtype}; cast them to one dtype")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; must be at least 1")


def _check_rows(
    q: Array, positions: Array | None, segment_ids: Array | None, with_cache: bool
) -> None:
    _check_row_shapes(q, positions, segment_ids)
    if positions is None and (segment_ids is not None or with_cache):
        raise ValueError(
            "positions are None, which means 0..L-1 in every row; with segment_ids or a cache pass "
            "each token's position in its document"
        )


def _check_row_shapes(q: Array, positions: Array | None, segment_ids: Array | None) -> None:
    for name, array in (("positions", positions), ("segment_ids", segment_ids)):
        if array is not None and array.shape != q.shape[:2]:
            raise ValueError(f"{name} has shape {array.shape}; expected {q.shape[:2]} as q's rows")


def _check_cache(cache: KeyValueCache, k: Array, v: Array, chunk_size: int) -> None:
    for name, slots, new in (("key", cache.key, k), ("value", cache.value, v)):
        expected = (new.shape[0], new.shape[2], chunk_size, new.shape[3])
        dtype = jnp.dtype(jnp.int8) if cache.is_quantized else new.dtype
        if slots.shape != expected or slots.dtype != dtype:
            raise ValueError(
                f"cache.{name} is {slots.dtype}{slots.shape}; expected {dtype}{expected}: "
                "the rows, heads and dtype of the new tokens, chunk_size slots"
            )
        check_scales(f"cache.{name}", slots, cache.is_quantized)


def _check_dropout(dropout: AttentionDropout) -> None:
    if not 0.0 <= dropout.rate < 1.0:
        raise ValueError(f"dropout.rate is {dropout.rate}; must be in [0, 1)")
    modes = get_args(DropoutMode)
    if dropout.mode not in modes:
        raise ValueError(
            f"dropout.mode is {dropout.mode!r}; use one of {', '.join(map(repr, modes))}"
        )
