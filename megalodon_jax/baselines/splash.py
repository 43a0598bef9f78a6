"""JAX's splash attention on TPUs."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from megalodon_jax.baselines.documents import document_numbers, pad_tokens, zero_padding
from megalodon_jax.baselines.packed import RESIDUALS
from megalodon_jax.typing import Array, Float, Int32
from pallas_kernels.common.target import find_target, is_interpreted

# The default takes it from one whole block on; below, nothing was estimated or measured.
SHORTEST_LENGTH = 512
# Tokens of a block, forward and backward. Heads of up to 256 compile for v4, v5e, v5p and v6e at
# the default limit of VMEM, as would blocks of 1024; those visit more of what the mask removes.
_BLOCK = 512
_LARGEST_HEAD = 256
_LANES = 128


def causal_attention(
    q: Float[Array, "B L H d"],
    k: Float[Array, "B L K d"],
    v: Float[Array, "B L K d"],
    *,
    window: int | None,
    segment_ids: Int32[Array, "B L"] | None,
) -> Float[Array, "B L H d"]:
    """Attention by splash attention. Arguments as in `attention.causal_attention`.

    float32 operands take the matrix unit's default precision.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    B, L, H, d = q.shape
    K = k.shape[2]
    q, k, v = zero_padding((q, k, v), segment_ids)
    q = q * jnp.asarray(1 / math.sqrt(d), q.dtype)
    block = min(_BLOCK, -(-L // _LANES) * _LANES)
    after = -L % block
    q, k, v = (jnp.swapaxes(pad_tokens(x, after), 1, 2) for x in (q, k, v))
    # One kernel call for every key head and the H / K query heads that read it.
    q = q.reshape(B, K, H // K, L + after, d)
    kernel: Callable[..., Array] = jax.vmap(
        _make_kernel(H // K, L + after, block, window), in_axes=(0, 0, 0, None)
    )
    documents = None
    if segment_ids is not None:
        numbers = pad_tokens(document_numbers(segment_ids) + 1, after)
        documents = SegmentIds(numbers, numbers)
    out = jax.vmap(kernel)(q, k, v, documents)
    out = jnp.swapaxes(out.reshape(B, H, L + after, d), 1, 2)[:, :L]
    return zero_padding(out, segment_ids)


def why_unsupported(
    q: Float[Array, "B L H d"], segment_ids: Int32[Array, "B L"] | None
) -> str | None:
    """Why splash attention cannot run these operands on the target; None if it can."""
    del segment_ids
    target = find_target()
    if not is_interpreted() and (target.platform != "tpu" or target.kind == "several devices"):
        return f"needs one TPU, this is {target.platform} ({target.kind})"
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"needs bfloat16 or float32, the operands are {q.dtype}"
    if q.shape[3] > _LARGEST_HEAD:
        return f"needs heads of up to {_LARGEST_HEAD}, these have {q.shape[3]}"
    return None


def _make_kernel(num_heads: int, length: int, block: int, window: int | None) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention

    shape = (length, length)
    if window is None or window >= length:
        mask = splash_attention.CausalMask(shape)
    else:
        mask = splash_attention.LocalMask(shape, window_size=(window - 1, 0), offset=0)
    sizes = splash_attention.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return splash_attention.make_splash_mqa(
        splash_attention.MultiHeadMask([mask] * num_heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=RESIDUALS,
        interpret=is_interpreted(),
    )
