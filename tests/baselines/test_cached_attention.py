"""Attention with a cache: pieces of a row equal the row, whatever is in unused slots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megalodon_jax.baselines import cached, cudnn
from megalodon_jax.baselines.cached import cached_attention
from megalodon_jax.modules.positions import document_positions
from pallas_kernels.chunk_attention import KeyValueCache
from tests.baselines.definition import draw, exact_attention, lay_out, relative_error, runs

HEADS = {"H": 4, "K": 2, "d": 8}
run = jax.jit(cached_attention, static_argnames="window")


def empty_cache(B, slots, *, K, d, **_):
    """Slots that were never written: NaN, which must not reach any output."""
    return KeyValueCache(*(jnp.full((B, K, slots, d), jnp.nan) for _ in range(2)))


def attend_in_pieces(qkv, pieces, cache, *, segment_ids=None, window=None):
    """Outputs of consecutive pieces of a row, and the last cache."""
    B = qkv[0].shape[0]
    begin, cached_tokens, outs = 0, np.zeros(B, np.int32), []
    for length in pieces:
        tokens = slice(begin, begin + length)
        ids = None if segment_ids is None else jnp.asarray(segment_ids[:, tokens])
        positions = document_positions((B, length), ids, jnp.asarray(cached_tokens))
        out, cache = run(
            *(jnp.asarray(x[:, tokens]) for x in qkv),
            cache,
            positions=positions,
            segment_ids=ids,
            window=window,
        )
        outs.append(np.asarray(out))
        for row in range(B):
            kept = range(length) if ids is None else np.flatnonzero(ids[row])
            if len(kept):
                cached_tokens[row] = int(np.asarray(positions)[row, kept[-1]]) + 1
        begin += length
    return np.concatenate(outs, axis=1), cache


@pytest.mark.parametrize(
    ("window", "slots"),
    [(None, 41), (None, 64), (7, 7), (7, 12), (40, 40)],
    ids=["full", "spare slots", "ring of the window", "larger ring", "ring never full"],
)
@pytest.mark.parametrize(
    "pieces",
    [(1,) * 5 + (36,), (13, 1, 1, 20, 6), (41,)],
    ids=["decode first", "decode between", "whole"],
)
def test_pieces_equal_the_row(pieces, window, slots):
    *qkv, cotangent = draw(1, 2, 41, **HEADS)
    out, _ = attend_in_pieces(qkv, pieces, empty_cache(2, slots, **HEADS), window=window)
    expected = exact_attention(*qkv, cotangent, window=window).out
    assert relative_error(out, expected) < 1e-6


@pytest.mark.parametrize(("window", "slots"), [(None, 30), (5, 6)])
def test_documents_and_padding_in_pieces(window, slots):
    # The first row ends a document and begins another inside a piece, twice in the third piece; the
    # second one has padding after its tokens; the third one is padding for a whole piece.
    segment_ids = lay_out(
        [(1, 6), (2, 12), (3, 4), (4, 15), (5, 2)],
        [(1, 8), (0, 2), (1, 9), (0, 1), (1, 10), (0, 9)],
        [(1, 10), (0, 10), (1, 19)],
    )
    pieces = (10, 10, 10, 1, 1, 7)
    *qkv, cotangent = draw(2, 3, 39, **HEADS)
    out, _ = attend_in_pieces(
        qkv, pieces, empty_cache(3, slots, **HEADS), segment_ids=segment_ids, window=window
    )
    # For the definition padding does not interrupt a document: the row without its padding.
    for row in range(3):
        tokens = np.flatnonzero(segment_ids[row])[None]
        row_qkv = [x[row][tokens] for x in (*qkv, cotangent)]
        expected = exact_attention(*row_qkv, segment_ids=segment_ids[row][tokens], window=window)
        assert relative_error(out[row][tokens], expected.out) < 1e-6
        assert not out[row, segment_ids[row] == 0].any()


def test_padding_is_neither_seen_nor_cached():
    segment_ids = lay_out([(1, 5), (0, 6)], [(0, 11)])
    *qkv, _ = draw(3, 2, 11, **HEADS)
    poisoned = [np.where((segment_ids == 0)[..., None, None], np.nan, x) for x in qkv]
    old = KeyValueCache(*(jnp.full((2, 2, 16, 8), float(i)) for i in (3, 4)))
    out, cache = attend_in_pieces(poisoned, (11,), old, segment_ids=segment_ids)
    clean, _ = attend_in_pieces(qkv, (11,), old, segment_ids=segment_ids)
    np.testing.assert_array_equal(out, clean)
    by_slot = (each.swap_heads_and_slots() for each in (cache, old))
    for new, before, tokens in zip(*by_slot, qkv[1:], strict=True):
        np.testing.assert_array_equal(new[0, :5], tokens[0, :5])
        np.testing.assert_array_equal(new[0, 5:], before[0, 5:])
        np.testing.assert_array_equal(new[1], before[1])


def test_slots_after_a_piece_are_those_of_the_last_document():
    segment_ids = lay_out([(1, 9), (2, 14), (0, 2)])
    *qkv, _ = draw(4, 1, 25, **HEADS)
    cache = empty_cache(1, 6, **HEADS)
    _, cache = attend_in_pieces(qkv, (25,), cache, segment_ids=segment_ids, window=6)
    # Positions 8 .. 13 of the second document, which begins at column 9.
    for slots, tokens in zip(cache.swap_heads_and_slots(), qkv[1:], strict=True):
        for position in range(8, 14):
            np.testing.assert_array_equal(slots[0, position % 6], tokens[0, 9 + position])


@pytest.mark.slow
def test_blocks_of_queries_change_nothing(monkeypatch):
    *qkv, _ = draw(5, 2, 23, **HEADS)
    segment_ids = lay_out([(1, 4), (2, 19)], [(1, 20), (0, 3)])
    tokens = (jnp.asarray(x) for x in draw(6, 2, 30, **HEADS)[1:3])
    cache = KeyValueCache(*tokens).swap_heads_and_slots()
    positions = document_positions((2, 23), segment_ids, jnp.asarray([7, 2]))

    def attend():
        options = {"positions": positions, "segment_ids": jnp.asarray(segment_ids)}
        return jax.jit(cached_attention)(*qkv, cache, **options)

    whole, _ = attend()
    # Five queries of the two rows and four heads at a time: the last block is not full.
    monkeypatch.setattr(cached, "_MAX_SCORES", 5 * 2 * 4 * (30 + 23))
    jax.clear_caches()
    blocks, _ = attend()
    assert relative_error(blocks, whole) < 1e-6


def plain_attention(q, k, v, *, num_keys, is_causal):
    """What `cudnn.attend_with_logsumexp` computes, in plain JAX."""
    L, S = q.shape[2], k.shape[2]
    k, v = (jnp.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    scores = jnp.einsum("bhld,bhsd->bhls", q, k) / np.sqrt(q.shape[3])
    if num_keys is not None:
        allowed = jnp.arange(S) < num_keys[:, None, None, None]
    else:
        allowed = jnp.tril(jnp.ones((L, S), bool)) | (not is_causal)
    scores = jnp.where(allowed, scores, -jnp.inf)
    out = jnp.einsum("bhls,bhsd->bhld", jax.nn.softmax(scores), v)
    return cudnn.PartialAttention(out, jax.nn.logsumexp(scores, axis=-1))


@pytest.mark.slow
def test_two_softmaxes_are_joined_into_one(monkeypatch):
    """The path of cuDNN with its kernels replaced, which need a GPU; the first piece is empty."""
    monkeypatch.setattr(cudnn, "why_unsupported", lambda q, segment_ids: None)
    monkeypatch.setattr(cudnn, "attend_with_logsumexp", plain_attention)
    jax.clear_caches()
    *qkv, cotangent = draw(7, 2, 41, **HEADS)
    out, _ = attend_in_pieces(qkv, (13, 20, 8), empty_cache(2, 48, **HEADS))
    monkeypatch.undo()
    jax.clear_caches()
    assert relative_error(out, exact_attention(*qkv, cotangent, window=None).out) < 1e-6


@pytest.mark.parametrize(("window", "slots"), [(None, 640), (128, 128)], ids=["full", "window"])
def test_pieces_by_cudnn_equal_the_row(window, slots):
    """On an NVIDIA GPU, in bfloat16; pieces of an odd and an even length."""
    *qkv, cotangent = draw(9, 2, 600, H=4, K=2, d=64)
    qkv = [np.asarray(jnp.asarray(x, jnp.bfloat16)) for x in qkv]
    if reason := cudnn.why_unsupported(jnp.asarray(qkv[0]), None):
        pytest.skip(f"cudnn {reason}")
    cache = KeyValueCache(*(jnp.full((2, 2, slots, 64), jnp.nan, jnp.bfloat16) for _ in range(2)))
    out, _ = attend_in_pieces(qkv, (301, 128, 171), cache, window=window)
    wide = [x.astype(np.float64) for x in qkv]
    expected = exact_attention(*wide, cotangent, window=window).out
    assert relative_error(out.astype(np.float64), expected) < 1e-2


@pytest.mark.parametrize("slots", [600, 700])
def test_blocks_of_keys_and_queries_change_nothing(slots):
    """Several blocks of both, a last block of slots that overlaps the one before it."""
    *qkv, cotangent = draw(8, 1, 600, H=2, K=1, d=4)
    out, _ = attend_in_pieces(qkv, (311, 289), empty_cache(1, slots, K=1, d=4))
    assert relative_error(out, exact_attention(*qkv, cotangent, window=None).out) < 1e-6


def test_a_cache_that_does_not_fit_is_named():
    q, k, v, _ = (jnp.asarray(x) for x in draw(0, 2, 5, **HEADS))
    positions = jnp.zeros((2, 5), jnp.int32)
    with pytest.raises(ValueError, match=r"cache\.key has shape"):
        cached_attention(q, k, v, empty_cache(1, 9, **HEADS), positions=positions)
    with pytest.raises(ValueError, match="a window of 10 tokens needs as many slots"):
        cached_attention(q, k, v, empty_cache(2, 9, **HEADS), positions=positions, window=10)
    with pytest.raises(ValueError, match="with H a multiple of K"):
        cached_attention(q[:, :, :3], k, v, empty_cache(2, 9, **HEADS), positions=positions)


def test_runs_of_one_id_are_different_documents():
    np.testing.assert_array_equal(runs([[1, 0, 1, 2, 2, 0]]), [[1, 0, 2, 3, 3, 0]])
