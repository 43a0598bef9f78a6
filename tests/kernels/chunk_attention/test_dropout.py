"""Dropout inside chunk attention, over all implementations."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.chunk_attention import AttentionDropout, KeyValueCache, chunk_attention

both = pytest.mark.parametrize("implementation", ["reference", "xla"])
C, L, RATE = 24, 48, 0.3

run = jax.jit(chunk_attention, static_argnames=("chunk_size", "implementation"))


def draw(seed, B=16) -> tuple[Any, Any, Any]:
    """q, k, and values so that out[t, s] is the weight of key s in its chunk."""
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(2, B, L, 2, 8)).astype(np.float32)
    values = np.broadcast_to(np.tile(np.eye(C, dtype=np.float32), (L // C, 1))[:, None], (L, 2, C))
    return q, k, np.broadcast_to(values, (B, L, 2, C))


def positions(B=16):
    return np.tile(np.arange(L, dtype=np.int32), (B, 1))


def drop(mode, seed=0):
    return AttentionDropout(RATE, jax.random.key(seed), mode)


@pytest.mark.parametrize("mode", ["softmax", "dropkey"])
@pytest.mark.parametrize(
    ("implementation", "masked"), [("reference", False), ("xla", False), ("xla", True)]
)
def test_drops_at_the_rate(mode, implementation, masked):
    q, k, v = draw(0)
    options = {"chunk_size": C, "implementation": implementation}
    if masked:
        options["positions"] = positions()
    weights = np.asarray(run(q, k, v, **options).out)
    dropped = np.asarray(run(q, k, v, dropout=drop(mode), **options).out)
    is_kept = dropped != 0
    causal = np.tril(np.ones((C, C), bool))[None, :, None]
    causal = np.broadcast_to(np.tile(causal, (1, L // C, 1, 1)), is_kept.shape)
    own = np.broadcast_to(np.tile(np.eye(C, dtype=bool)[:, None], (L // C, 1, 1)), is_kept.shape)
    random = causal if mode == "softmax" else causal & ~own
    count = random.sum()
    assert abs(is_kept[random].mean() - (1 - RATE)) < 4 * np.sqrt(RATE * (1 - RATE) / count)
    assert not is_kept[~causal].any()
    if mode == "softmax":
        expected = weights * is_kept / (1 - RATE)
    else:
        assert is_kept[own].all()
        expected = weights * is_kept / (weights * is_kept).sum(-1, keepdims=True)
    np.testing.assert_allclose(dropped, expected, rtol=2e-5, atol=1e-7)


@both
@pytest.mark.parametrize("mode", ["softmax", "dropkey"])
def test_the_key_decides(mode, implementation):
    q, k, v = draw(1)
    options = {"chunk_size": C, "implementation": implementation}
    first, again, other = (
        np.asarray(run(q, k, v, dropout=drop(mode, seed), **options).out) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    # Rows, heads and chunks are dropped independently.
    is_kept = (first != 0).reshape(16, L // C, C, 2, C)
    assert (is_kept[0] != is_kept[1]).any()
    assert (is_kept[:, 0] != is_kept[:, 1]).any()
    assert (is_kept[:, :, :, 0] != is_kept[:, :, :, 1]).any()


@both
@pytest.mark.parametrize("mode", ["softmax", "dropkey"])
def test_gradients_use_the_same_mask(mode, implementation):
    q, k, v = draw(2, B=2)
    options = {"chunk_size": C, "positions": positions(2), "implementation": implementation}
    cotangent = np.random.default_rng(3).normal(size=v.shape).astype(np.float32)
    is_kept = np.asarray(run(q, k, v, dropout=drop(mode), **options).out) != 0

    @jax.jit
    def found(q, k, v):
        def attend(*qkv):
            return chunk_attention(*qkv, dropout=drop(mode), **options).out

        return jax.vjp(attend, q, k, v)[1](cotangent)

    @jax.jit
    @jax.default_matmul_precision("highest")
    def expected(q, k, v):
        def attend(q, k, v):
            chunks = (x.reshape(2, L // C, C, 2, -1) for x in (q, k, v))
            q, k, v = chunks
            mask = jnp.asarray(is_kept).reshape(2, L // C, C, 2, C).transpose(0, 1, 3, 2, 4)
            scores = jnp.einsum("bnqhd,bnkhd->bnhqk", q, k)
            inside = mask if mode == "dropkey" else jnp.tril(jnp.ones((C, C), bool))
            weights = jax.nn.softmax(jnp.where(inside, scores, -1e30), axis=-1)
            if mode == "softmax":
                weights = weights * mask / (1 - RATE)
            return jnp.einsum("bnhqk,bnkhd->bnqhd", weights, v).reshape(2, L, 2, C)

        return jax.vjp(attend, q, k, v)[1](cotangent)

    for a, b in zip(found(q, k, v), expected(q, k, v)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("mode", ["softmax", "dropkey"])
def test_one_cached_token(mode):
    """Dropout on the decoding path: as on the others, and never the token's own key in dropkey."""
    B, position = 64, 9
    q, k, v = (x[:, position : position + 1] for x in draw(4, B))
    rng = np.random.default_rng(5)
    cache = KeyValueCache(
        jnp.asarray(rng.normal(size=(B, 2, C, 8)), jnp.float32),
        jnp.asarray(np.broadcast_to(np.eye(C, dtype=np.float32), (B, 2, C, C))),
    )
    options = {"chunk_size": C, "cache": cache, "positions": np.full((B, 1), position, np.int32)}
    weights = np.asarray(run(q, k, v, **options).out)[..., : position + 1]
    dropped = np.asarray(run(q, k, v, dropout=drop(mode), **options).out)
    assert not dropped[..., position + 1 :].any()
    dropped = dropped[..., : position + 1]
    is_kept = dropped != 0
    random = is_kept if mode == "softmax" else is_kept[..., :position]
    assert abs(random.mean() - (1 - RATE)) < 4 * np.sqrt(RATE * (1 - RATE) / random.size)
    if mode == "softmax":
        expected = weights * is_kept / (1 - RATE)
    else:
        assert is_kept[..., position].all()
        expected = weights * is_kept / (weights * is_kept).sum(-1, keepdims=True)
    np.testing.assert_allclose(dropped, expected, rtol=2e-5, atol=1e-7)


def test_rate_zero_drops_nothing_and_bad_settings_are_refused():
    q, k, v = draw(6, B=1)
    plain = run(q, k, v, chunk_size=C).out
    none = AttentionDropout(0.0, jax.random.key(0))
    np.testing.assert_array_equal(run(q, k, v, chunk_size=C, dropout=none).out, plain)
    with pytest.raises(ValueError, match=r"dropout.rate is 1.0; must be in \[0, 1\)"):
        run(q, k, v, chunk_size=C, dropout=AttentionDropout(1.0, jax.random.key(0)))
    with pytest.raises(
        ValueError, match=r"dropout.mode is 'keys'; use one of 'softmax', 'dropkey'"
    ):
        run(q, k, v, chunk_size=C, dropout=AttentionDropout(0.1, jax.random.key(0), "keys"))  # type: ignore
