"""States and slopes between splits, by Triton, against sums over splits in float64; documents of
packed rows, against running sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common.target import find_target
from pallas_kernels.timestep_norm.row_splits import state_passing
from pallas_kernels.timestep_norm.row_splits.documents import describe_rows, pack_token_info
from pallas_kernels.timestep_norm.row_splits.types import (
    TILE,
    TimestepNormGeometry,
    TimestepNormGpuOptions,
)

# Splits of two tiles, of which the last one has one; groups that fill no program's last block.
TILES, GROUPS = 9, 3
SPLIT = 2 * TILE
# Rows of documents and lengths, 0 is padding: one over all splits; boundaries at a split, inside
# splits and at the row's last token; padding before, between and after; padding alone.
ROWS = [
    [(1, 1152)],
    [(1, 256), (2, 100), (3, 412), (4, 383), (5, 1)],
    [(0, 600), (1, 100), (0, 20), (1, 60), (2, 30), (0, 342)],
    [(1, 40), (2, 900), (0, 212)],
    [(0, 1152)],
]
INITIAL_COUNTS = [0, 7, 900, 0, 3]


@pytest.fixture(autouse=True)
def triton():
    return pytest.importorskip("triton", reason="needs the extra: pip install -e '.[triton]'")


def make_options(num_rows, tiles_per_split=2, tiles=TILES, groups=GROUPS, **fields):
    # The kernels are not run: only what is between them.
    from pallas_kernels.timestep_norm.triton.launch import TRITON_KERNELS

    geometry = TimestepNormGeometry(num_rows, tiles, tiles_per_split, groups, 1, 8, 8)
    interpret = find_target().platform != "gpu"
    return TimestepNormGpuOptions(TRITON_KERNELS, 1e-5, geometry, interpret, **fields)


def segment_ids():
    return jnp.asarray([np.concatenate([np.full(n, i) for i, n in row]) for row in ROWS], jnp.int32)


def draw(num_rows, splits, groups, offset=0.0):
    """Moments of splits without empty ones, states, slopes and cotangents, in float32."""
    rng = np.random.default_rng(splits)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    summaries = normal(num_rows, splits - 1, groups, 4)
    summaries[..., 0] = rng.integers(1, SPLIT, (num_rows, splits - 1, 1))
    summaries[..., 1] += offset
    summaries[..., 3] = summaries[..., 0] * rng.uniform(0.5, 2, summaries.shape[:3])
    return {
        "summaries": summaries,
        "initial": (offset + normal(num_rows, groups), 1 + normal(num_rows, groups) ** 2),
        "prior": (offset + normal(groups), 1 + normal(groups) ** 2),
        "slopes": normal(num_rows, splits - 1, groups, 2),
        "states": offset + normal(num_rows, splits, groups, 3),
        "pivots": offset + normal(num_rows, splits, groups),
        "final": state_passing.FinalStateGradients(
            300 * normal(num_rows, groups), 300 * normal(num_rows, groups),
            offset + normal(num_rows, groups),
        ),
    }  # fmt: skip


def both(function, *arguments):
    """Results of the kernel, and of XLA in float64, for (options, *arguments, row_info)."""
    options, *arrays, (counts, prior_count, ids, length) = arguments
    rows = [jnp.asarray(counts, jnp.int32), jnp.asarray(prior_count, jnp.int32), ids, length]
    actual = getattr(options.kernels, function)(
        options, *jax.tree.map(jnp.asarray, arrays), describe_rows(options, *rows)
    )
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), arrays)
        expected = getattr(state_passing, function)(options, *wide, describe_rows(options, *rows))
        assert expected.dtype == jnp.float64
        return np.asarray(actual, np.float64), np.asarray(expected)


def assert_states_equal(actual, expected, counts, tolerance):
    """Compares what states stand for: means, up to the deviation, and squares."""
    mean = [s[..., 0] + s[..., 1] / np.maximum(counts, 1) for s in (actual, expected)]
    scale = np.sqrt(expected[..., 2] / np.maximum(counts, 1)) + 1e-30
    assert np.max(np.abs(mean[0] - mean[1]) / scale) <= tolerance
    np.testing.assert_allclose(actual[..., 2], expected[..., 2], rtol=tolerance)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("splits", [2, 5, 9])
def test_whole_rows(splits, offset):
    tiles_per_split = 1 if splits == 9 else 2
    tiles = TILES if splits > 2 else 3
    options = make_options(2, tiles_per_split, tiles)
    given = draw(2, splits, GROUPS, offset)
    row_info = [0, 900], 0, None, tiles * TILE
    actual, expected = both(
        "previous_states", options, given["summaries"], given["initial"], given["prior"], row_info
    )
    counts = np.cumsum(given["summaries"][..., 0], axis=1)
    counts = np.pad(counts, ((0, 0), (1, 0), (0, 0))) + np.asarray([0, 900])[:, None, None]
    # Squares around means that are a few float32 roundings of the offset apart from each other.
    assert_states_equal(actual, expected, counts, 5e-6)
    for final in (given["final"], None):
        states = given["states"].copy()
        states[..., 0] = given["pivots"]
        arrays = given["slopes"], given["pivots"], states, final
        actual, expected = both("next_slopes", options, *arrays, row_info)
        np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_packed_rows(offset):
    options = make_options(len(ROWS))
    ids, splits = segment_ids(), options.geometry.splits
    given = draw(len(ROWS), splits, GROUPS, offset)
    row_info = INITIAL_COUNTS, 5, ids, TILES * TILE
    # A split without tokens that feed the next one has an empty summary.
    ends = np.asarray(ids)[:, SPLIT - 1 :: SPLIT][:, : splits - 1]
    tokens = np.asarray(ids)[:, : (splits - 1) * SPLIT].reshape(len(ROWS), splits - 1, SPLIT)
    largest = np.maximum.accumulate(np.asarray(ids), axis=1)[:, SPLIT - 1 :: SPLIT]
    in_document = (tokens == largest[:, : splits - 1, None]) & (tokens != 0)
    given["summaries"][..., 0] = in_document.sum(-1)[..., None]
    given["summaries"][given["summaries"][..., 0] == 0] = 0
    assert (ends == 0).any()
    actual, expected = both(
        "previous_states", options, given["summaries"], given["initial"], given["prior"], row_info
    )
    # Pivots and sums around them differ by a rounding: compare squares, and pivots up to it.
    np.testing.assert_allclose(actual[..., 2], expected[..., 2], rtol=5e-6)
    np.testing.assert_allclose(actual[..., 0], expected[..., 0], rtol=1e-6, atol=1e-6)
    # Slopes of a split are 0 if its first token starts a document, and padding's are not used.
    starts = np.asarray(ids)[:, SPLIT::SPLIT] != np.asarray(ids)[:, SPLIT - 1 : -1 : SPLIT]
    given["slopes"][starts & (np.asarray(ids)[:, SPLIT::SPLIT] != 0)] = 0
    for final in (given["final"], None):
        arrays = given["slopes"], given["pivots"], given["states"], final
        actual, expected = both("next_slopes", options, *arrays, row_info)
        np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=1e-5 * (1 + offset))


def test_other_documents_do_not_matter():
    options = make_options(len(ROWS))
    given = draw(len(ROWS), options.geometry.splits, GROUPS)
    rows = (
        jnp.asarray(INITIAL_COUNTS, jnp.int32), jnp.int32(5), segment_ids(), TILES * TILE,
    )  # fmt: skip
    row_info = describe_rows(options, *rows)

    def states(changed):
        summaries = given["summaries"].copy()
        if changed:
            # The first two splits of row 3: the first one ends in document 2, as the second does.
            summaries[1, 0] = np.inf
            summaries[1, 0, :, 0] = 256
        return np.asarray(
            options.kernels.previous_states(
                options, jnp.asarray(summaries), given["initial"], given["prior"], row_info
            )
        )

    expected, actual = states(False), states(True)
    assert not np.isfinite(actual[1, 1]).all()
    # Document 2 starts with the second split.
    np.testing.assert_array_equal(actual[1, 2:], expected[1, 2:])
    np.testing.assert_array_equal(actual[[0, 2, 3, 4]], expected[[0, 2, 3, 4]])


def test_rows_that_start_from_nothing_read_no_initial_state():
    given = draw(2, 5, GROUPS)
    row_info = describe_rows(
        make_options(2), jnp.zeros(2, jnp.int32), jnp.int32(0), None, TILES * TILE
    )
    zeros = jnp.zeros((2, GROUPS))
    results = [
        options.kernels.previous_states(
            options, jnp.asarray(given["summaries"]), (zeros, zeros), (zeros[0], zeros[0]), row_info
        )
        for options in (make_options(2), make_options(2, starts_empty=True))
    ]
    np.testing.assert_array_equal(*results)


def test_means_keep_the_digits_that_a_large_offset_takes():
    """Splits of equal means but for 1e-6, around 1000, where float32 numbers are 6e-5 apart."""
    splits, groups = 9, 1
    options = make_options(1, 1, TILES, groups, starts_empty=True)
    summaries = np.zeros((1, splits - 1, groups, 4), np.float32)
    offsets = 1e-6 * np.arange(splits - 1)
    summaries[0, :, 0] = np.stack(
        [np.full(splits - 1, 128.0), np.full(splits - 1, 1000.0), offsets, 0 * offsets], axis=1
    )
    row_info = describe_rows(options, jnp.zeros(1, jnp.int32), jnp.int32(0), None, TILES * TILE)
    zeros = jnp.zeros((1, groups))
    states = np.asarray(
        options.kernels.previous_states(
            options, jnp.asarray(summaries), (zeros, zeros), (zeros[0], zeros[0]), row_info
        ),
        np.float64,
    )[0, 1:, 0]
    counts = 128 * np.arange(1, splits)
    means = (states[:, 0] - 1000) + states[:, 1] / counts
    expected = np.cumsum(offsets) / np.arange(1, splits)
    np.testing.assert_allclose(means, expected, atol=1e-11)
    squares = [128 * np.square(offsets[: n + 1] - expected[n]).sum() for n in range(splits - 1)]
    np.testing.assert_allclose(states[:, 2], squares, rtol=1e-4, atol=1e-20)


@pytest.mark.slow
@pytest.mark.parametrize("starts_empty", [False, True])
@pytest.mark.parametrize(("block", "tiles_per_split"), [(512, 2), (128, 3), (256, 9)])
def test_token_info(block, tiles_per_split, starts_empty, monkeypatch):
    """Blocks that are longer and shorter than splits, and a last one that is cut off."""
    monkeypatch.setattr("pallas_kernels.timestep_norm.triton.documents.BLOCK", block)
    options = make_options(len(ROWS), tiles_per_split, starts_empty=starts_empty)
    # Ids of a sequence shard begin above 1.
    ids = segment_ids()
    ids = ids.at[3].set(jnp.where(ids[3] == 0, 0, ids[3] + 6))
    counts = [0] * len(ROWS) if starts_empty else INITIAL_COUNTS
    counts = jnp.asarray(counts, jnp.int32), jnp.int32(0 if starts_empty else 5)
    actual = options.kernels.token_info(options, ids, *counts)
    expected = pack_token_info(options, ids, *counts)
    np.testing.assert_array_equal(actual, expected)
