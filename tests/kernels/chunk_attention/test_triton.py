"""The Triton kernels on wide values, windows of keys, and what they refuse (contract: others)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.chunk_attention import AttentionDropout, KeyValueCache, api, chunk_attention
from pallas_kernels.chunk_attention.context_parallel import KeysInReach
from pallas_kernels.chunk_attention.intervals import noncausal_intervals
from pallas_kernels.chunk_attention.triton.block_sizes import choose_tiles
from pallas_kernels.chunk_attention.triton.launch import Intervals, query_runs
from pallas_kernels.common.measured_choice import MeasuredChoice
from pallas_kernels.common.target import find_target, interpreted

pytestmark = pytest.mark.usefixtures("runnable")


def relative(actual, expected):
    expected = np.asarray(expected, np.float64)
    return np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected)


def run(operands, implementation, dtype, **options):
    """Output and gradients of q, k, v."""
    with jax.enable_x64(dtype == jnp.float64):

        @jax.jit
        def both_passes(q, k, v, do):
            def attend(*qkv):
                return chunk_attention(*qkv, implementation=implementation, **options).out

            out, pull_back = jax.vjp(attend, q, k, v)
            return out, *pull_back(do)

        return [
            np.asarray(a, np.float64) for a in both_passes(*(a.astype(dtype) for a in operands))
        ]


def draw(seed, rows, length, heads, key_width, value_width):
    rng = np.random.default_rng(seed)
    widths = (key_width, key_width, value_width, value_width)
    operands = [rng.normal(size=(rows, length, heads, width)) for width in widths]
    # Numbers that bfloat16 has, so that only the arithmetic is compared.
    return [np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in operands]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "causal", "widths", "implementation"),
    [
        (jnp.float32, True, (20, 150), "triton"),
        (jnp.float32, False, (72, 24), "triton"),
        (jnp.bfloat16, True, (20, 600), "triton"),
        (jnp.bfloat16, False, (72, 150), "triton"),
    ],
)
def test_values_in_several_blocks_equal_float64(dtype, causal, widths, implementation):
    """Packed rows whose padding is NaN; widths and lengths that fill no tile."""
    length, chunk_size = 83, 40
    q, k, v, do = draw(0, 1, length, 2, *widths)
    ids = np.zeros((1, length), np.int32)
    positions = np.zeros_like(ids)
    for number, (begin, end) in enumerate([(0, 9), (12, 75), (75, 80)], start=1):
        ids[0, begin:end], positions[0, begin:end] = number, np.arange(end - begin)
    options = {
        "chunk_size": chunk_size, "causal": causal, "positions": positions, "segment_ids": ids,
    }  # fmt: skip
    want = run((q, k, v, do), "reference", jnp.float64, **options)
    tiles = choose_tiles("forward", *widths, dtype, find_target().gpu_limits.shared_memory)
    assert tiles.is_narrow == (widths == (72, 150) and dtype == jnp.bfloat16)
    padding = (ids == 0)[:, :, None, None]
    q, k, v, do = (np.where(padding, np.nan, a) for a in (q, k, v, do))
    found = run((q, k, v, do), implementation, dtype, **options)
    allowed = [1e-6, 5e-6, 5e-6, 5e-6] if dtype == jnp.float32 else [4e-3, 8e-3, 8e-3, 4e-3]
    for actual, expected, error in zip(found, want, allowed, strict=True):
        assert relative(actual, expected) <= error
        assert not np.any(actual[ids == 0])


@pytest.mark.parametrize("implementation", ["triton"])
def test_cached_keys_get_gradients(implementation):
    """The keys begin before the queries; empty slots hold NaN."""
    chunk_size, num_cached, length = 16, 5, 30
    q, k, v, do = (a.astype(np.float32) for a in draw(1, 2, length, 1, 8, 12))
    before = draw(2, 2, chunk_size, 1, 8, 12)
    positions = np.tile(np.arange(num_cached, num_cached + length, dtype=np.int32), (2, 1))

    def gradients(name, empty):
        filled = np.arange(chunk_size)[:, None, None] < num_cached
        slots = [np.where(filled, a, empty).astype(np.float32) for a in before[1:3]]
        cache = KeyValueCache(*map(jnp.asarray, slots)).swap_heads_and_slots()

        def loss(q, k, v, cache):
            result = chunk_attention(
                q, k, v, chunk_size=chunk_size, positions=positions, cache=cache,
                implementation=name,
            )  # fmt: skip
            return jnp.sum(result.out * do), result.cache

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(q, k, v, cache)

    found, cache = gradients(implementation, np.nan)
    expected, expected_cache = gradients("xla", 0.0)
    for actual, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert relative(actual, wanted) <= 5e-6
    for actual, wanted in zip(cache, expected_cache, strict=True):
        np.testing.assert_array_equal(actual, wanted)


def random_rows(rng, length):
    """Segment ids with padding between and after documents, and positions."""
    ids, positions = np.zeros((2, 1, length), np.int32)
    at, number = 0, 0
    while at < length:
        count = min(int(rng.integers(1, 14)), length - at)
        if rng.random() < 0.75:
            number += 1
            ids[0, at : at + count], positions[0, at : at + count] = number, np.arange(count)
        at += count
    return ids, positions


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("with_positions", [False, True])
def test_intervals_are_the_keys_of_the_definition(chunk_size, with_positions):
    """Also in a sequence shard, whose keys begin before and end after its queries."""
    rng = np.random.default_rng(3)
    for before, after in ((0, 0), (5, 5), (7, 0)):
        if not with_positions and chunk_size is not None and before:
            continue  # chunks that begin with the shards: no other keys
        ids, positions = random_rows(rng, 60)
        row = slice(20 - before, 40 + after)
        ids, positions = ids[:, row], positions[:, row]
        keys = KeysInReach(
            jnp.zeros((*ids.shape, 1, 2)),
            jnp.zeros((*ids.shape, 1, 2)),
            jnp.asarray(positions) if with_positions else None,
            jnp.asarray(ids),
            jnp.asarray(before),
        )
        start, stop = map(np.asarray, noncausal_intervals(keys, chunk_size, 20))
        column = np.arange(ids.shape[1])
        chunk = np.zeros_like(column)
        if chunk_size is not None:
            chunk = (positions[0] if with_positions else column) // chunk_size
        own = slice(before, before + 20)
        sees = (ids[0, own, None] == ids[0]) & (ids[0, own, None] != 0)
        sees &= chunk[own, None] == chunk
        found = (start[0][:, None] <= column) & (column < stop[0][:, None])
        np.testing.assert_array_equal(found, sees)
        size = 4
        first, end = map(np.asarray, query_runs(Intervals(start, stop), len(column), size))
        for tile in range(first.shape[1]):
            seen_by = np.flatnonzero(sees[:, tile * size : (tile + 1) * size].any(axis=1))
            inside = np.arange(first[0, tile], end[0, tile])
            assert set(seen_by) <= set(inside)
            # Queries without keys lie between the others, or before them.
            assert not set(inside) - set(seen_by) - set(np.flatnonzero(~sees.any(axis=1)))


def test_what_the_kernels_cannot_do_is_refused():
    x = jnp.zeros((1, 8, 1, 4))
    drop = AttentionDropout(0.1, jax.random.key(0))
    wide = jnp.zeros((1, 8, 1, 320))
    with interpreted():
        for options in ({}, {"causal": False}):
            options = {"chunk_size": 8, "implementation": "triton", **options}
            with pytest.raises(ValueError, match=r"no attention dropout.*rate is 0\.1.*'xla'"):
                chunk_attention(x, x, x, dropout=drop, **options)
            with pytest.raises(ValueError, match="at most 256 wide, q's are 320"):
                chunk_attention(wide, wide, x, **options)
            with jax.enable_x64(True), pytest.raises(ValueError, match="q is float64"):
                chunk_attention(*(a.astype(jnp.float64) for a in (x, x, x)), **options)


def test_measured_kernels_become_the_default(monkeypatch):
    """`megalodon tune` names them by operation and width; what they cannot run stays in XLA."""
    x = jax.ShapeDtypeStruct((2, 64, 1, 32), jnp.bfloat16)
    drop = AttentionDropout(0.1, jax.random.key(0))

    def measured(*choices):
        found = [MeasuredChoice(name, "bfloat16", 32, 128, which) for name, which in choices]
        monkeypatch.setattr(
            "pallas_kernels.common.measured_choice.read_choices", lambda kind: found
        )
        causal = [api._choose_implementation(x, x, 64, d) for d in (None, drop)]
        return causal + [api._choose_for_encoder(x, x, d) for d in (None, drop)]

    monkeypatch.setattr("pallas_kernels.common.triton.is_installed", lambda: True)
    assert measured() == ["xla"] * 4
    assert measured(("chunk_attention", "triton")) == ["triton", "xla", "xla", "xla"]
    assert measured(("noncausal_attention", "triton")) == ["xla", "xla", "triton", "xla"]
