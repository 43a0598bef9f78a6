"""cuDNN's flash attention on NVIDIA GPUs: the only module that knows how JAX reaches it.

`jax.nn.dot_product_attention` has no packed documents. JAX's private function under it has them, by
their offsets (jax 0.11 and 0.12).
"""

import contextlib
import functools
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from megalodon_jax.baselines.documents import pad_tokens
from megalodon_jax.baselines.packed import (
    DocumentOffsets,
    packed_attention,
    vjp_with_named_residuals,
)
from megalodon_jax.typing import Array, Float, Float32, Int32
from pallas_kernels.common.target import Target, find_target

# Documents of a row in one call. The workspace takes about B·M·L·H·d·4 bytes; on an H100, forward
# and backward at (8, 2048, 8, 128) take 0.56 ms with 16, 1.3 ms with 64 and 4.1 ms with 256.
DOCUMENTS_PER_CALL = 16
# cuDNN of the targets of `megalodon_jax.compiled.topologies`, 9.12, as cuDNN writes its version.
_AHEAD_OF_TIME_VERSION = 91200
_HOPPER = (9, 0)
_AMPERE = (8, 0)


def causal_attention(
    q: Float[Array, "B L H d"],
    k: Float[Array, "B L K d"],
    v: Float[Array, "B L K d"],
    *,
    window: int | None,
    segment_ids: Int32[Array, "B L"] | None,
) -> Float[Array, "B L H d"]:
    """Attention by cuDNN. Arguments as in `attention.causal_attention`."""
    L = q.shape[1]
    if window is not None and window >= L:
        window = None
    # cuDNN refuses to train with odd lengths.
    q, k, v = (pad_tokens(x, L % 2) for x in (q, k, v))
    if segment_ids is None:
        return _attend_rows_with_rule(window, q, k, v)[:, :L]
    out = packed_attention(
        functools.partial(_attend_documents, window),
        q,
        k,
        v,
        segment_ids=pad_tokens(segment_ids, L % 2),
        documents_per_call=min(DOCUMENTS_PER_CALL, q.shape[1]),
    )
    return out[:, :L]


def why_unsupported(
    q: Float[Array, "B L H d"], segment_ids: Int32[Array, "B L"] | None
) -> str | None:
    """Why cuDNN cannot run these operands on the target; None if it can."""
    target = find_target()
    capability = _compute_capability(target)
    if target.platform != "gpu" or target.kind == "several devices" or capability is None:
        return f"needs one NVIDIA GPU, this is {target.platform} ({target.kind})"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, the operands are {q.dtype}"
    if capability < _AMPERE:
        return f"needs a GPU of compute capability 8.0 or newer, {target.kind} is {capability}"
    if segment_ids is not None and capability < _HOPPER:
        return f"packed documents need a Hopper GPU or newer, this is {target.kind}"
    largest = 256 if capability >= _HOPPER else 128
    if q.shape[3] > largest or q.shape[3] % 8:
        return f"needs heads of a multiple of 8 up to {largest}, these have {q.shape[3]}"
    return None


def _attend_rows(window: int | None, q: Array, k: Array, v: Array) -> Array:
    sides = None if window is None else (window - 1, 0)
    with _checks_of_target():
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=True, local_window_size=sides, implementation="cudnn"
        )


# A rule of our own, only to name the residuals.
_attend_rows_with_rule = jax.custom_vjp(_attend_rows, nondiff_argnums=(0,))
_attend_rows_with_rule.defvjp(
    lambda window, *operands: vjp_with_named_residuals(
        functools.partial(_attend_rows, window), *operands
    ),
    lambda window, pull_back, do: pull_back(do),
)


def _attend_documents(
    window: int | None, q: Array, k: Array, v: Array, offsets: DocumentOffsets
) -> Array:
    # Private, therefore imported only where it is needed.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    starts, lengths = offsets
    with _checks_of_target():
        out: Any = dot_product_attention(
            q,
            k,
            v,
            q_seqlen=lengths,
            kv_seqlen=lengths,
            q_offsets=starts,
            kv_offsets=starts,
            scale=1 / math.sqrt(q.shape[3]),
            mask_type=MaskType.PADDING_CAUSAL,
            sliding_window_length=window,
        )
    return out


class PartialAttention(NamedTuple):
    """Attention to some of the keys.

    Attributes:
      out: weighted values, the weights of these keys alone.
      logsumexp: log of the sum of the exponentials of their scores.
    """

    out: Float[Array, "B H L d"]
    logsumexp: Float32[Array, "B H L"]


def attend_with_logsumexp(
    q: Float[Array, "B H L d"],
    k: Float[Array, "B K S d"],
    v: Float[Array, "B K S d"],
    *,
    num_keys: Int32[Array, " B"] | None,
    is_causal: bool,
) -> PartialAttention:
    """Attention to the first `num_keys` keys of each row, at least one; None: to all of them.

    JAX's public function rounds the logarithms to the dtype of the output.

    Args:
      q: queries.
      k: keys.
      v: values; finite, also behind the first `num_keys`.
      num_keys: keys of each row.
      is_causal: query i sees the keys up to i; only without `num_keys`.
    """
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    lengths: dict[str, Any] = {}
    if num_keys is None:
        mask = MaskType.CAUSAL if is_causal else MaskType.NO_MASK
    else:
        all_queries = jnp.full(q.shape[0], q.shape[2], jnp.int32)
        lengths = {"q_seqlen": all_queries, "kv_seqlen": num_keys}
        mask = MaskType.PADDING
    with _checks_of_target():
        out: Any = dot_product_attention(
            q,
            k,
            v,
            **lengths,
            scale=1 / math.sqrt(q.shape[3]),
            mask_type=mask,
            qkv_layout="BNTH",
            return_residual=True,
        )
    return PartialAttention(*out)


def _compute_capability(target: Target) -> tuple[int, int] | None:
    """Compute capability of an NVIDIA GPU; None for other devices."""
    if target.platform != "gpu":
        return None
    if not _is_ahead_of_time(target):
        device = jax.local_devices(backend="gpu")[0]
        match = re.fullmatch(r"(\d+)\.(\d+)", getattr(device, "compute_capability", ""))
        return None if match is None else (int(match[1]), int(match[2]))
    # Other GPUs have no description to compile for.
    return _HOPPER if target.is_hopper else None


def _is_ahead_of_time(target: Target) -> bool:
    return target.platform == "gpu" and jax.default_backend() != "gpu"


@contextlib.contextmanager
def _checks_of_target() -> Iterator[None]:
    """Lets JAX's checks of cuDNN read the target where the host has no GPU.

    When JAX traces a call, it asks the host's own GPU and cuDNN whether they can run it. An
    ahead-of-time compilation on a host without them would fail, although the compiler needs only
    the description of the target. On a host with a GPU nothing is replaced.
    """
    target = find_target()
    if not _is_ahead_of_time(target):
        yield
        return
    from jax._src.cudnn import fused_attention_stablehlo as module

    capability = _compute_capability(target) or (0, 0)

    def parse(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split("."))

    replacements = {
        "check_cudnn_version": lambda: _AHEAD_OF_TIME_VERSION,
        "check_compute_capability": lambda needed: capability >= parse(needed),
        "is_cuda_compute_capability_equal": lambda other: capability == parse(other),
    }
    originals = {name: getattr(module, name) for name in replacements}
    try:
        for name, replacement in replacements.items():
            setattr(module, name, replacement)
        yield
    finally:
        for name, original in originals.items():
            setattr(module, name, original)
