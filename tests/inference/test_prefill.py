"""Prefill in pieces: equal to one pass over the prompt, ragged rows equal to rows alone."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from flax import nnx

from megalodon_jax.inference.prefill import Piece, PieceSizes, empty_prefill_state, prefill_piece
from megalodon_jax.models import abstract_model
from tests.golden_files import relative_error
from tests.inference.models import CHUNK, CONFIG, next_logits, random_prompt, small_model

SIZES = PieceSizes((4 * CHUNK, CHUNK), (4, CHUNK))
# The fastest implementations of the operations; one pass is computed by the reference ones.
FASTEST = dataclasses.replace(CONFIG, implementation=None)


def run(prompts: list[np.ndarray]):
    graphdef, _ = abstract_model(FASTEST)
    params = nnx.state(small_model())
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    padded = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    state = empty_prefill_state(graphdef, params, len(prompts))
    for piece in SIZES.split(padded.shape[1]):
        state = prefill_piece(graphdef, params, state, padded, lengths, piece)
    return state


def test_pieces_cover_the_prompt_and_padding_is_last():
    for length in range(1, 12 * CHUNK):
        for start in (0, CHUNK, 5):
            if start >= length:
                continue
            pieces = list(SIZES.split(length, start))
            assert pieces[0].start == start
            assert sum(piece.count for piece in pieces) == length - start
            assert all(p.start + p.count == q.start for p, q in itertools.pairwise(pieces))
            assert all(piece.count == piece.size for piece in pieces[:-1])
            assert all(piece.size in {*SIZES.whole, *SIZES.padded} for piece in pieces)
            last = pieces[-1]
            assert all(piece.is_whole for piece in pieces[:-1])
            assert last.is_whole == (last.count in SIZES.whole)
            smaller = [size for size in SIZES.padded if size < last.size]
            assert last.count > max(smaller, default=0) or last.size in SIZES.whole


@pytest.mark.slow
def test_sizes_of_a_model_follow_its_chunk():
    sizes = PieceSizes.for_model(small_model())
    assert sizes == PieceSizes((8 * CHUNK, CHUNK), (CHUNK,))
    assert list(sizes.split(1)) == [Piece(0, 1, CHUNK, is_whole=False)]


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 7])
def test_pieces_equal_one_pass(length: int):
    prompt = random_prompt(length)
    state = run([prompt])
    assert relative_error(state.logits[0], next_logits(prompt)) <= 2e-6
    np.testing.assert_array_equal(state.cache.position, [length])


@pytest.mark.slow
def test_ragged_rows_equal_rows_alone():
    lengths = (3, 5 * CHUNK + 7, CHUNK, 4 * CHUNK, 1)
    prompts = [random_prompt(length, seed) for seed, length in enumerate(lengths)]
    together = run(prompts)
    np.testing.assert_array_equal(together.cache.position, lengths)
    for row, prompt in enumerate(prompts):
        assert relative_error(together.logits[row], next_logits(prompt)) <= 2e-6
        alone = run([prompt])
        for a, b in zip(
            jax.tree.leaves(together.cache.layers), jax.tree.leaves(alone.cache.layers), strict=True
        ):
            if a.ndim == 4:
                filled = len(prompt) % CHUNK
                a, b = a[:, :, :filled], b[:, :, :filled]
            np.testing.assert_allclose(a[row], b[0], rtol=0, atol=2e-5)
