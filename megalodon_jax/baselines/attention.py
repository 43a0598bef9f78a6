"""Causal attention of the baseline: check, choose an implementation, call it."""

import math
from collections.abc import Callable
from typing import Any, get_args

import jax.numpy as jnp

from megalodon_jax.baselines import blocked, cudnn, splash
from megalodon_jax.baselines.documents import document_numbers, repeat_heads, zero_padding
from megalodon_jax.config import AttentionImplementation
from megalodon_jax.typing import Array, Float, Int32
from pallas_kernels.chunk_attention.types import accumulation_dtype, matmul_precision
from pallas_kernels.common.dispatch import check_implementation
from pallas_kernels.common.symbolic import has_symbolic_shape
from pallas_kernels.common.target import find_target


def causal_attention(
    q: Float[Array, "B L H d"],
    k: Float[Array, "B L K d"],
    v: Float[Array, "B L K d"],
    *,
    window: int | None = None,
    segment_ids: Int32[Array, "B L"] | None = None,
    implementation: AttentionImplementation | None = None,
) -> Float[Array, "B L H d"]:
    """Softmax attention: o[t] = Σ_s softmax_s(q[t]·k[s] / √d) v[s], Vaswani et al. 2017, eq. 1.

    s runs over the tokens of t's document with t - window < s <= t. The operands are local: under a
    mesh of several devices call it inside `jax.shard_map`.

    Args:
      q: queries.
      k: keys; query head h reads key head h // (H / K) (grouped-query attention).
      v: values.
      window: tokens that a query sees, its own included; None: all before it.
      segment_ids: documents of a row, each a run of equal ids. 0 is padding: its output is 0, and
        its q, k and v are ignored. None: a row is one document.
      implementation: "reference" (dense, L x L scores), "xla" (blocks, any platform), "cudnn"
        (NVIDIA GPUs; bfloat16 or float16; Hopper or newer with segment_ids), "splash" (TPUs), or
        None: cudnn and splash where they run, and for splash from 512 tokens of bfloat16 on; else
        xla.

    Returns:
      The weighted values, in the dtype of v.

    Raises:
      ValueError: shapes or dtypes do not fit together; the implementation does not exist or cannot
        run these operands on this device.
    """
    _check_operands(q, k, v, window, segment_ids)
    check_implementation("attention", implementation, get_args(AttentionImplementation))
    name = implementation or _choose_implementation(q, segment_ids)
    if name in _WHY_UNSUPPORTED and (reason := _WHY_UNSUPPORTED[name](q, segment_ids)):
        raise ValueError(
            f"attention by {name!r}: {reason}; use implementation 'xla', or None for the fastest "
            "one on the target"
        )
    return _IMPLEMENTATIONS[name](q, k, v, window=window, segment_ids=segment_ids)


def _reference(
    q: Float[Array, "B L H d"],
    k: Float[Array, "B L K d"],
    v: Float[Array, "B L K d"],
    *,
    window: int | None,
    segment_ids: Int32[Array, "B L"] | None,
) -> Float[Array, "B L H d"]:
    """The definition, with a dense mask; float64-capable."""
    L, H, d = q.shape[1:]
    q, k, v = zero_padding((q, k, v), segment_ids)
    k, v = repeat_heads(k, H), repeat_heads(v, H)
    wide, precision = accumulation_dtype(q.dtype), matmul_precision(q.dtype)
    index = jnp.arange(L)
    distance = index[:, None] - index
    allowed = ((distance >= 0) & (distance < (window or L)))[None]
    if segment_ids is not None:
        number = document_numbers(segment_ids)
        allowed &= (number[:, :, None] == number[:, None]) & (number >= 0)[:, :, None]
    allowed = allowed[:, None]
    scores = jnp.einsum("bthd,bshd->bhts", q, k, precision=precision, preferred_element_type=wide)
    scores = jnp.where(allowed, scores / math.sqrt(d), jnp.finfo(wide).min)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.where(allowed, weights / jnp.sum(weights, axis=-1, keepdims=True), 0)
    weights = weights.astype(v.dtype)
    out = jnp.einsum(
        "bhts,bshd->bthd", weights, v, precision=precision, preferred_element_type=wide
    )
    return out.astype(v.dtype)


_IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {
    "reference": _reference,
    "xla": blocked.causal_attention,
    "cudnn": cudnn.causal_attention,
    "splash": splash.causal_attention,
}
# Why an implementation cannot run some operands on the target; None if it can.
_WHY_UNSUPPORTED: dict[str, Callable[[Array, Any], str | None]] = {
    "cudnn": cudnn.why_unsupported,
    "splash": splash.why_unsupported,
}


def _choose_implementation(
    q: Array, segment_ids: Int32[Array, "B L"] | None
) -> AttentionImplementation:
    if has_symbolic_shape(q):
        return "xla"
    platform = find_target().platform
    if platform == "gpu" and cudnn.why_unsupported(q, segment_ids) is None:
        return "cudnn"
    if (
        platform == "tpu"
        and q.dtype == jnp.bfloat16
        and q.shape[1] >= splash.SHORTEST_LENGTH
        and splash.why_unsupported(q, segment_ids) is None
    ):
        return "splash"
    return "xla"


def _check_operands(
    q: Array, k: Array, v: Array, window: int | None, segment_ids: Array | None
) -> None:
    if (
        q.ndim != 4
        or k.ndim != 4
        or k.shape != v.shape
        or (*q.shape[:2], q.shape[3]) != (*k.shape[:2], k.shape[3])
    ):
        raise ValueError(
            f"q, k, v have shapes {q.shape}, {k.shape}, {v.shape}; "
            "expected (B, L, H, d), (B, L, K, d), (B, L, K, d)"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{q.shape[2]} query heads cannot share {k.shape[2]} key heads; use a multiple of it"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; cast them to one dtype"
        )
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; must be at least 1, or None for all tokens before")
    if segment_ids is not None and segment_ids.shape != q.shape[:2]:
        raise ValueError(
            f"segment_ids has shape {segment_ids.shape}; expected {q.shape[:2]} as q's rows"
        )
