"""Causal attention with a cache of keys and values: prefill in pieces, and single decode steps."""

import functools
import math

import jax
import jax.numpy as jnp

from megalodon_jax.baselines import cudnn
from megalodon_jax.baselines.cached_pieces import (
    attend_by_cudnn,
    attend_in_window,
    attend_to_cache,
)
from megalodon_jax.baselines.documents import pad_tokens
from megalodon_jax.typing import Array, Bool, Float, Int32
from pallas_kernels.chunk_attention.types import (
    KeyValueCache,
    accumulation_dtype,
    last_token,
    matmul_precision,
)
from pallas_kernels.common.target import find_target

# Scores of one block of queries: 256 MiB of float32.
_MAX_SCORES = 1 << 26
_GPU_ROWS = 16


def cached_attention(
    q: Float[Array, "B L H d"],
    k: Float[Array, "B L K d"],
    v: Float[Array, "B L K d"],
    cache: KeyValueCache,
    *,
    positions: Int32[Array, "B L"],
    segment_ids: Int32[Array, "B L"] | None = None,
    window: int | None = None,
) -> tuple[Float[Array, "B L H d"], KeyValueCache]:
    """`causal_attention` of new tokens to the cached and the new ones, and the next cache.

    The token at position p of its document is in slot p % S. The cache holds one document of a row:
    only the row's first document sees it, and the row's last document is in it afterwards. Other
    slots may hold anything.

    Args:
      q: queries of the new tokens.
      k: keys of the new tokens; query head h reads key head h // (H / K).
      v: values of the new tokens.
      cache: keys and values, (B, K, S, d). Without a window no document is longer than S tokens;
        with one, S is at least `window`.
      positions: of the new tokens in their documents, as `modules.positions.document_positions`
        gives them: positions[:, 0] is the number of tokens that the cached document has had.
      segment_ids: documents of a row, 0 for padding, whose output is 0 and which is not cached.
        None: all tokens continue the cached document.
      window: tokens that a query sees, its own included; None: all before it.

    Returns:
      The weighted values in the dtype of v, and the cache after the row's last token. A row of
      padding keeps its cache.

    Raises:
      ValueError: the cache does not fit the keys, or the window does not fit in the cache.
    """
    _check(q, k, v, cache, window)
    is_token = jnp.ones(positions.shape, bool) if segment_ids is None else segment_ids != 0
    if q.shape[1] == 1:
        # A row's only token is in the cache's document, or begins one at position 0.
        cache = _write(cache, k, v, positions, segment_ids)
        out = _decode(q, cache, positions[:, 0], is_token[:, 0], window)
        return out.astype(v.dtype), cache
    written = _write(cache, k, v, positions, segment_ids)
    if segment_ids is not None or (window is not None and q.shape[1] < cache.key.shape[2]):
        return _attend_in_blocks(q, k, v, cache, positions, is_token, window), written
    num_cached = positions[:, 0]
    if window is not None:
        out = attend_in_window(q, k, v, cache, num_cached, window)
    elif cudnn.why_unsupported(q, None) is None:
        out = attend_by_cudnn(q, k, v, written, num_cached)
    else:
        out = attend_to_cache(q, written, positions)
    return out.astype(v.dtype), written


def _write(
    cache: KeyValueCache,
    k: Float[Array, "B L K d"],
    v: Float[Array, "B L K d"],
    positions: Int32[Array, "B L"],
    segment_ids: Int32[Array, "B L"] | None,
) -> KeyValueCache:
    """Writes the last S tokens of each row's last document in place."""
    L, S = k.shape[1], cache.key.shape[2]
    last, last_position = (x[:, None] for x in last_token(positions, segment_ids))
    index = jnp.arange(L, dtype=jnp.int32)
    first = jnp.maximum(last - last_position, last - S + 1)
    # Other tokens write past the end, which drops them.
    slot = jnp.where((index >= first) & (index <= last), positions % S, S)
    # Mapped over rows: indexing with row numbers would make XLA gather the caches of all devices.
    write = jax.vmap(lambda slots, slot, new: slots.at[:, slot].set(new, mode="drop"))
    return KeyValueCache(
        write(cache.key, slot, k.astype(cache.key.dtype).swapaxes(1, 2)),
        write(cache.value, slot, v.astype(cache.value.dtype).swapaxes(1, 2)),
    )


def _decode(
    q: Float[Array, "B 1 H d"],
    cache: KeyValueCache,
    position: Int32[Array, " B"],
    is_token: Bool[Array, " B"],
    window: int | None,
) -> Float[Array, "B 1 H d"]:
    """Attention of one token a row to the slots, its own among them: bound by reading the cache.

    GPUs get products of at least 16 rows: fewer would become sums over copies of the cache.
    """
    allowed = _visible_slots(cache, position[:, None], position[:, None], window)
    allowed = allowed[:, 0] & is_token[:, None]
    q = _group_heads(q, cache)[:, 0]
    group_size = q.shape[2]
    if find_target().platform == "gpu":
        q = jnp.pad(q, ((0, 0), (0, 0), (0, max(0, _GPU_ROWS - group_size)), (0, 0)))
    einsum = functools.partial(
        jnp.einsum,
        precision=matmul_precision(q.dtype),
        preferred_element_type=accumulation_dtype(q.dtype),
    )
    scores = einsum("bkgd,bksd->bkgs", q, cache.key)
    (weights,) = _softmax([(scores, allowed[:, None, None])])
    # Slots that no query of the row sees may hold anything, and 0 times NaN is NaN.
    value = jnp.where(allowed[:, None, :, None], cache.value, 0)
    out = einsum("bkgs,bksd->bkgd", weights.astype(value.dtype), value)[:, :, :group_size]
    return out.reshape(q.shape[0], 1, -1, q.shape[-1])


def _attend_in_blocks(
    q: Float[Array, "B L H d"],
    k: Float[Array, "B L K d"],
    v: Float[Array, "B L K d"],
    cache: KeyValueCache,
    positions: Int32[Array, "B L"],
    is_token: Bool[Array, "B L"],
    window: int | None,
) -> Float[Array, "B L H d"]:
    B, L, H, d = q.shape
    cached_position = positions[:, :1] - 1
    # A row's cached tokens are those that its first token sees without a window.
    holds = _visible_slots(cache, cached_position, cached_position, None)[:, 0]
    cached_key, cached_value = cache.swap_heads_and_slots()
    cached_value = jnp.where(holds[:, :, None, None], cached_value, 0)
    k, v = (jnp.where(is_token[:, :, None, None], x, 0) for x in (k, v))
    index = jnp.arange(L, dtype=jnp.int32)
    # Negative or 0 for the row's first document, which the cached tokens precede.
    document_start = index - positions

    def attend(block: tuple[Array, ...]) -> Array:
        q, index, position, start, is_token = block
        in_cache = _visible_slots(cache, cached_position, position, window)
        in_cache &= ((start <= 0) & is_token)[:, :, None]
        distance = index[:, :, None] - jnp.arange(L)
        in_row = (distance >= 0) & (jnp.arange(L) >= start[:, :, None]) & is_token[:, :, None]
        if window is not None:
            in_row &= distance < window
        q = _group_heads(q, cache)
        to_cache, to_row = _softmax(
            [
                (_scores(q, cached_key), in_cache[:, None, None]),
                (_scores(q, k), in_row[:, None, None]),
            ]
        )
        out = _weighted_sum(to_cache, cached_value) + _weighted_sum(to_row, v)
        return out.astype(v.dtype)

    most = max(1, _MAX_SCORES // (B * H * (cache.key.shape[2] + L)))
    blocks = -(-L // most)
    size = -(-L // blocks)

    def split(x: Array) -> Array:
        x = pad_tokens(x, blocks * size - L)
        return jnp.moveaxis(x.reshape(B, blocks, size, *x.shape[2:]), 1, 0)

    index = jnp.broadcast_to(index, (B, L))
    operands = [split(x) for x in (q, index, positions, document_start, is_token)]
    out = jax.lax.map(attend, tuple(operands))
    return jnp.moveaxis(out, 0, 1).reshape(B, blocks * size, H, d)[:, :L]


def _visible_slots(
    cache: KeyValueCache,
    newest: Int32[Array, "B 1"],
    position: Int32[Array, "B Q"],
    window: int | None,
) -> Bool[Array, "B Q S"]:
    """Slots that hold a token in the window of a query, if `newest` was written last."""
    S = cache.key.shape[2]
    slot = jnp.arange(S, dtype=jnp.int32)
    held = (newest - (newest - slot) % S)[:, None]
    visible = (held >= 0) & (held <= position[:, :, None])
    return visible if window is None else visible & (held > position[:, :, None] - window)


def _group_heads(q: Float[Array, "B Q H d"], cache: KeyValueCache) -> Float[Array, "B Q K G d"]:
    """Scaled queries, those of one key head together."""
    d, num_key_heads = q.shape[3], cache.key.shape[1]
    q = q * jnp.asarray(1 / math.sqrt(d), q.dtype)
    return q.reshape(*q.shape[:2], num_key_heads, -1, d)


def _scores(q: Float[Array, "B Q K G d"], k: Float[Array, "B S K d"]) -> Float[Array, "B K G Q S"]:
    return jnp.einsum(
        "bqkgd,bskd->bkgqs",
        q,
        k,
        precision=matmul_precision(q.dtype),
        preferred_element_type=accumulation_dtype(q.dtype),
    )


def _softmax(parts: list[tuple[Array, Bool[Array, "..."]]]) -> list[Array]:
    """Weights of one softmax over the allowed keys of all parts; 0 for a query without keys.

    Args:
      parts: scores of some keys (the last axis), and which of them a query sees.
    """
    masked = [jnp.where(allowed, s, jnp.finfo(s.dtype).min) for s, allowed in parts]
    highest = functools.reduce(jnp.maximum, (s.max(-1, keepdims=True) for s in masked))
    weights = [
        jnp.where(allowed, jnp.exp(s - highest), 0)
        for s, (_, allowed) in zip(masked, parts, strict=True)
    ]
    total = sum(w.sum(-1, keepdims=True) for w in weights)
    total = jnp.where(total > 0, total, 1)
    return [w / total for w in weights]


def _weighted_sum(
    weights: Float[Array, "B K G Q S"], v: Float[Array, "B S K d"]
) -> Float[Array, "B Q K G d"]:
    return jnp.einsum(
        "bkgqs,bskd->bqkgd",
        weights.astype(v.dtype),
        v,
        precision=matmul_precision(v.dtype),
        preferred_element_type=accumulation_dtype(v.dtype),
    )


def _check(q: Array, k: Array, v: Array, cache: KeyValueCache, window: int | None) -> None:
    B, L, H, d = q.shape
    for name, slots, new in (("key", cache.key, k), ("value", cache.value, v)):
        if slots.ndim != 4 or slots.shape != (B, new.shape[2], slots.shape[2], new.shape[3]):
            raise ValueError(
                f"cache.{name} has shape {slots.shape}; expected ({B}, {new.shape[2]}, S, "
                f"{new.shape[3]}): the rows and key heads of the new tokens"
            )
    if k.shape != v.shape or k.shape[:2] != (B, L) or k.shape[3] != d or H % k.shape[2]:
        raise ValueError(
            f"q, k, v have shapes {q.shape}, {k.shape}, {v.shape}; expected (B, L, H, d), "
            "(B, L, K, d), (B, L, K, d) with H a multiple of K"
        )
    if window is not None and window > cache.key.shape[2]:
        raise ValueError(
            f"a window of {window} tokens needs as many slots; the cache has {cache.key.shape[2]}"
        )
