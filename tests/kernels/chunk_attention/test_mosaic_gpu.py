"""The Hopper kernels, in their interpreter where there is no such GPU, against float64."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.chunk_attention import AttentionDropout, KeyValueCache, chunk_attention
from pallas_kernels.common.target import find_target, interpreted

# Outputs and weights are rounded to bfloat16, 1.7e-3 each, gradients of scores once more.
LARGEST_ERROR = {"out": 3e-3, "q": 4e-3, "k": 4e-3, "v": 3e-3}


@pytest.fixture(autouse=True)
def runnable():
    if find_target().is_hopper:
        yield
        return
    with interpreted():
        yield


def lay_out(*documents):
    """Positions and segment ids of one row from documents (id, first position, length)."""
    positions = [np.arange(first, first + length) for _, first, length in documents]
    ids = [np.full(length, number) for number, _, length in documents]
    return tuple(jnp.asarray(np.concatenate(a)[None], jnp.int32) for a in (positions, ids))


def random_operands(num_rows, length, heads, key_width, value_width, seed=0):
    rng = np.random.default_rng(seed)
    widths = {"q": key_width, "k": key_width, "v": value_width, "do": value_width}
    return {
        name: jnp.asarray(rng.normal(size=(num_rows, length, heads, width)), jnp.bfloat16)
        for name, width in widths.items()
    }


def run(operands, implementation, dtype, **rows):
    with jax.enable_x64(dtype == jnp.float64):

        @jax.jit
        def both_passes(q, k, v, do):
            def attend(q, k, v):
                return chunk_attention(
                    q * q.shape[-1] ** -0.5, k, v, implementation=implementation, **rows
                ).out

            out, pull_back = jax.vjp(attend, q, k, v)
            return dict(zip("qkv", pull_back(do), strict=True)) | {"out": out}

        cast = {name: value.astype(dtype) for name, value in operands.items()}
        return {name: np.asarray(a, np.float64) for name, a in both_passes(**cast).items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "heads", "widths", "chunk_size", "documents"),
    [
        (450, 1, (64, 64), 384, None),
        (300, 1, (64, 320), 100, None),
        (300, 2, (96, 64), 130, [(1, 0, 140), (0, 0, 3), (2, 0, 1), (3, 60, 150), (0, 0, 6)]),
    ],
)
def test_equals_float64(length, heads, widths, chunk_size, documents):
    operands = random_operands(1, length, heads, *widths)
    rows = {"chunk_size": chunk_size}
    if documents is not None:
        rows["positions"], rows["segment_ids"] = lay_out(*documents)
    want = run(operands, "reference", jnp.float64, **rows)
    got = run(operands, "mosaic_gpu", jnp.bfloat16, **rows)
    for name, allowed in LARGEST_ERROR.items():
        error = np.linalg.norm(got[name] - want[name]) / np.linalg.norm(want[name])
        assert error <= allowed, (name, error)


@pytest.mark.slow
def test_scores_far_from_zero_are_repaired():
    """exp2(score) overflows there, of which the interpreter warns."""
    operands = random_operands(1, 256, 1, 64, 64)
    is_large = jnp.arange(256)[:, None, None] % 7 == 3
    operands["q"] = jnp.where(is_large, 60 * operands["q"], operands["q"])
    rows = {"chunk_size": 256}
    want = run(operands, "reference", jnp.float64, **rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        got = run(operands, "mosaic_gpu", jnp.bfloat16, **rows)
    # One weight is near 1: dO Vᵀ and rowsum(dO * O) nearly cancel, and O is rounded.
    for name, allowed in (LARGEST_ERROR | {"q": 1e-2, "k": 1.2e-2}).items():
        error = np.linalg.norm(got[name] - want[name]) / np.linalg.norm(want[name])
        assert error <= allowed, (name, error)


# The interpreter's warnings about 1e30 squared, in a document that is not compared.
@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.slow
def test_documents_are_independent_of_others_and_of_padding():
    positions, segment_ids = lay_out((1, 0, 70), (0, 0, 4), (2, 0, 60), (0, 0, 6))
    rows = {"chunk_size": 64, "positions": positions, "segment_ids": segment_ids}
    operands = random_operands(1, 140, 1, 64, 64)
    is_compared = np.asarray(segment_ids)[..., None, None] == 2
    padding = np.asarray(segment_ids)[..., None, None] == 0

    def change(name, value):
        value = np.where(is_compared, np.asarray(value, np.float32), 1e30 if name != "do" else 0)
        return jnp.asarray(np.where(padding, np.nan, value), jnp.bfloat16)

    disturbed = {name: change(name, value) for name, value in operands.items()}
    plain = operands | {"do": jnp.where(is_compared, operands["do"], 0)}
    plain, disturbed = (
        run(each, "mosaic_gpu", jnp.bfloat16, **rows) for each in (plain, disturbed)
    )
    where = {name: np.broadcast_to(is_compared, value.shape) for name, value in plain.items()}
    for name, value in plain.items():
        np.testing.assert_array_equal(
            value[where[name]], disturbed[name][where[name]], err_msg=name
        )
    np.testing.assert_array_equal(
        disturbed["out"][np.broadcast_to(padding, disturbed["out"].shape)], 0
    )


@pytest.mark.slow
def test_continues_a_cache():
    chunk_size, num_cached, length = 96, 40, 130
    operands = random_operands(2, length, 1, 64, 64)
    before = random_operands(2, chunk_size, 1, 64, 64, seed=1)
    filled = np.arange(chunk_size)[None, :, None, None] < num_cached
    cache = KeyValueCache(*(jnp.where(filled, before[name], jnp.nan) for name in ("k", "v")))
    cache = cache.swap_heads_and_slots()
    positions = jnp.broadcast_to(jnp.arange(num_cached, num_cached + length), (2, length))
    call = jax.jit(chunk_attention, static_argnames=("chunk_size", "implementation"))
    got, want = (
        call(
            *(operands[name] for name in ("q", "k", "v")),
            chunk_size=chunk_size,
            positions=positions,
            cache=cache,
            implementation=implementation,
        )
        for implementation in ("mosaic_gpu", "xla")
    )
    out, right = (np.asarray(each.out, np.float64) for each in (got, want))
    assert np.linalg.norm(out - right) <= 4e-3 * np.linalg.norm(right)
    for mine, others in zip(got.cache, want.cache, strict=True):
        np.testing.assert_array_equal(mine, others)


@pytest.mark.parametrize(
    ("dtype", "width", "dropout", "message"),
    [
        (jnp.float32, 64, None, "multiplies bfloat16, q is float32"),
        (jnp.bfloat16, 320, None, "at most 256 wide, q's are 320"),
        (jnp.bfloat16, 64, 0.1, "no attention dropout"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused(dtype, width, dropout, message):
    operands = random_operands(1, 8, 1, width, 64)
    arguments = [operands[name].astype(dtype) for name in ("q", "k", "v")]
    drops = None if dropout is None else AttentionDropout(dropout, jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        chunk_attention(*arguments, chunk_size=8, dropout=drops, implementation="mosaic_gpu")


@pytest.mark.slow
def test_packed_rows_after_a_cache_equal_float64():
    """Training rows that continue documents: both passes, rows at different positions."""
    chunk_size, length, num_cached = 96, 130, (40, 0)
    rows = [lay_out((1, 40, 70), (2, 0, 60)), lay_out((1, 192, 3), (2, 0, 120), (0, 0, 7))]
    positions, segment_ids = (jnp.concatenate(arrays) for arrays in zip(*rows, strict=True))
    operands = random_operands(2, length, 1, 64, 64)
    before = random_operands(2, chunk_size, 1, 64, 64, seed=1)
    filled = np.arange(chunk_size) < np.array(num_cached)[:, None]

    def run_with_cache(implementation, dtype, empty):
        slots = (
            np.where(filled[..., None, None], np.asarray(before[name], np.float64), empty)
            for name in ("k", "v")
        )
        cache = KeyValueCache(*(np.swapaxes(a, 1, 2).astype(dtype) for a in slots))
        return run(
            operands, implementation, dtype, chunk_size=chunk_size, positions=positions,
            segment_ids=segment_ids, cache=cache,
        )  # fmt: skip

    want = run_with_cache("reference", jnp.float64, 0.0)
    got = run_with_cache("mosaic_gpu", jnp.bfloat16, np.nan)
    for name, allowed in LARGEST_ERROR.items():
        error = np.linalg.norm(got[name] - want[name]) / np.linalg.norm(want[name])
        assert error <= allowed, (name, error)
    # The cache matters to the first document only.
    without = run(
        operands, "reference", jnp.float64, chunk_size=chunk_size, segment_ids=segment_ids,
        positions=positions,
    )  # fmt: skip
    assert np.abs(without["out"][0, :56] - want["out"][0, :56]).max() > 0.1
    # A GPU sums the float64 products of rows with and without a cache in different orders.
    np.testing.assert_allclose(without["out"][0, 70:], want["out"][0, 70:], rtol=0, atol=1e-14)
