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

# Shorter rows are one block; XLA's dense attention is as good there.
SHORTEST_LENGTH = 512
# Blocks that compile for v5e at the default limit of VMEM.
_FORWARD_BLOCK = 512
_BACKWARD_BLOCK = 256
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
    block = min(_FORWARD_BLOCK, -(-L // _LANES) * _LANES)
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
    return None


def _make_kernel(num_heads: int, length: int, block: int, window: int | None) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention

    shape = (length, length)
    if window is None or window >= length:
        mask = splash_attention.CausalMask(shape)
    else:
        mask = splash_attention.LocalMask(shape, window_size=(window - 1, 0), offset=0)
    backward = min(block, _BACKWARD_BLOCK)
    if block % backward:
        backward = _LANES
    sizes = splash_attention.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=backward,
        block_kv_dkv=backward,
        block_q_dq=backward,
        block_kv_dq=backward,
    )
    return splash_attention.make_splash_mqa(
        splash_attention.MultiHeadMask([mask] * num_heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=RESIDUALS,
        interpret=is_interpreted(),
    )
