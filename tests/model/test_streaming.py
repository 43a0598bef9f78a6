"""Streaming: pieces of any sizes with a cache equal one call on the whole sequence."""

import chex
import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.cache import MAX_POSITION
from megalodon_jax.model import Megalodon
from tests.golden_files import relative_error


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 61, (3, 75)).astype(np.int32)


# The chunk size is 16: pieces within a chunk, up to its end, across one boundary and several.
# All tests here use pieces of 34, 13 and 1, which limits the number of compiled shapes.
@pytest.mark.parametrize(
    "pieces", [[34, 13, 1, 13, 13, 1], [1, 1, 1, 13, 13, 34, *[1] * 12], [1] * 7 + [34, 34]]
)
@pytest.mark.slow
def test_pieces_equal_one_call(
    jitted, small_model: Megalodon, tokens: np.ndarray, pieces: list[int]
):
    assert sum(pieces) == tokens.shape[1]
    whole, no_cache = jitted(small_model)(tokens)
    assert no_cache is None
    call, cache, start, outputs = jitted(small_model), small_model.init_cache(3), 0, []
    for length in pieces:
        logits, cache = call(tokens[:, start : start + length], cache)
        outputs.append(logits)
        start += length
    assert relative_error(np.concatenate(outputs, 1), whole) <= 2e-6
    np.testing.assert_array_equal(cache.position, [75] * 3)


@pytest.mark.slow
def test_prior_is_the_initial_state_of_a_stream(
    jitted, small_model_with_prior: Megalodon, tokens: np.ndarray
):
    model = small_model_with_prior
    whole, _ = jitted(model)(tokens)
    call, cache, outputs = jitted(model), model.init_cache(3), []
    for piece in np.split(tokens, 3, axis=1):
        logits, cache = call(piece, cache)
        outputs.append(logits)
    assert relative_error(np.concatenate(outputs, 1), whole) <= 2e-6


def test_one_token_at_a_time_inside_scan(jitted, small_model: Megalodon, tokens: np.ndarray):
    whole, _ = jitted(small_model)(tokens)
    graphdef, state = nnx.split(small_model)

    @jax.jit
    def decode(state, tokens, cache):
        model = nnx.merge(graphdef, state)

        def step(cache, token):
            logits, cache = model(token[:, None], cache=cache)
            return cache, logits[:, 0]

        return jax.lax.scan(step, cache, tokens.T)

    cache, logits = decode(state, jnp.asarray(tokens), small_model.init_cache(3))
    assert relative_error(jnp.swapaxes(logits, 0, 1), whole) <= 2e-6
    np.testing.assert_array_equal(cache.position, [75] * 3)


@pytest.mark.slow
def test_rows_at_different_positions(jitted, small_model: Megalodon, tokens: np.ndarray):
    """Right-padded prompts of different lengths, then single tokens, some rows padded."""
    lengths = np.array([33, 5, 34])
    padded = (np.arange(34) < lengths[:, None]).astype(np.int32)
    call = jitted(small_model)
    _, cache = call(tokens[:, :34], small_model.init_cache(3), padded)
    np.testing.assert_array_equal(cache.position, lengths)
    expected, _ = call(tokens)
    for step in range(20):
        active = np.array([1, 1, step % 2], np.int32)
        position = np.asarray(cache.position)
        logits, cache = call(tokens[np.arange(3), position][:, None], cache, active[:, None])
        for row in np.flatnonzero(active):
            error = relative_error(logits[row, 0], expected[row, position[row]])
            assert error <= 1e-5, (step, row)
    np.testing.assert_array_equal(cache.position, lengths + np.array([20, 20, 10]))


def test_padding_does_not_change_the_cache(jitted, small_model: Megalodon, tokens: np.ndarray):
    call = jitted(small_model)
    _, cache = call(tokens[:, :13], small_model.init_cache(3))
    _, after = call(tokens[:, 13:47], cache, np.zeros((3, 34), np.int32))
    logits, _ = call(tokens[:, 13:47], cache)
    logits_after, _ = call(tokens[:, 13:47], after)
    np.testing.assert_array_equal(after.position, cache.position)
    assert relative_error(logits_after, logits) <= 1e-6


@pytest.mark.slow
def test_documents_across_pieces(jitted, small_model: Megalodon, tokens: np.ndarray):
    """A packed row in pieces: a new segment id resets the row, the same id continues it."""
    segment_ids = np.repeat([[1, 2, 3]], 3, 0).repeat([20, 25, 30], axis=1).astype(np.int32)
    call, cache, outputs = jitted(small_model), small_model.init_cache(3), []
    whole, _ = call(tokens, segment_ids=segment_ids)
    for piece in np.split(np.arange(75), [1, 2, 3, 4, 5, 6, 40, 41]):
        logits, cache = call(tokens[:, piece], cache, segment_ids[:, piece])
        outputs.append(logits)
    assert relative_error(np.concatenate(outputs, 1), whole) <= 2e-6
    np.testing.assert_array_equal(cache.position, [30] * 3)
    np.testing.assert_array_equal(cache.segment, [3] * 3)


def test_reset_rows(jitted, small_model: Megalodon, tokens: np.ndarray):
    call = jitted(small_model)
    _, cache = call(tokens[:, :34], small_model.init_cache(3))
    cache = small_model.reset_rows(cache, jnp.array([False, True, False]))
    logits, cache = call(tokens[:, 34:68], cache)
    separate, _ = call(tokens[:, 34:68], small_model.init_cache(3))
    whole, _ = call(tokens)
    assert relative_error(logits[1], separate[1]) <= 2e-6
    assert relative_error(logits[0], whole[0, 34:68]) <= 2e-6
    np.testing.assert_array_equal(cache.position, [68, 34, 68])


def test_cache_size_is_constant_and_its_position_is_checked(jitted, small_model: Megalodon):
    cache = small_model.init_cache(3)
    _, longer = jitted(small_model)(np.zeros((3, 34), np.int32), cache)
    chex.assert_trees_all_equal_shapes_and_dtypes(cache, longer)
    longer.check_room(MAX_POSITION - 34)
    with pytest.raises(OverflowError, match="34"):
        longer.check_room(MAX_POSITION - 33)
