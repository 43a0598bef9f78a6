"""Evaluation by streaming pieces through the cache equals one call on the whole document."""

import math

import jax
import numpy as np
import pytest
from flax import nnx

from megalodon_jax.data import ByteTokenizer
from megalodon_jax.errors import DataError
from megalodon_jax.evaluation.decoded import decode_batch
from megalodon_jax.evaluation.streaming import (
    evaluate_documents,
    evaluate_files,
    score_sequences,
    streaming_batches,
)
from megalodon_jax.inference.decoders import prepare_decoding
from megalodon_jax.model import Megalodon
from megalodon_jax.train_state import init_state

# Lengths around the piece length of 16: with bos, 15 bytes fill a piece exactly.
TEXTS = [
    "a" * 15,
    "hello",
    "x" * 31,
    "The quick brown fox jumps over the lazy dog " * 2,
    "é",
    "b" * 14,
]


@pytest.fixture(scope="module")
def model(session_config) -> Megalodon:
    graphdef, state = init_state(session_config)
    return nnx.merge(graphdef, state.params)


@pytest.fixture(scope="module")
def nats(model) -> float:
    """Cross-entropy in float64 from one call per whole document."""
    graphdef, state = nnx.split(model)
    call = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens).logits)
    total = 0.0
    for text in TEXTS:
        stream = np.array([[256, *text.encode(), 256]], np.int32)
        padded = np.pad(stream[:, :-1], ((0, 0), (0, 100 - stream.shape[1])))
        logits = np.asarray(call(state, padded), np.float64)[0, : stream.shape[1] - 1]
        log_z = np.log(np.exp(logits).sum(-1))
        total += float(np.sum(log_z - logits[np.arange(len(logits)), stream[0, 1:]]))
    return total


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.slow
def test_streaming_equals_one_call(model, nats, batch_size):
    result = evaluate_documents(
        model, ByteTokenizer(), TEXTS, batch_size=batch_size, piece_length=16
    )
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert result.num_bytes == num_bytes
    assert result.num_tokens == num_bytes + len(TEXTS)
    assert result.loss == pytest.approx(nats / result.num_tokens, rel=1e-6)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nats / result.num_tokens), rel=1e-5)


@pytest.mark.slow
def test_decoding_steps_equal_one_call(model, nats):
    """Rows of several documents, one of which ends inside a piece."""
    graphdef, params = nnx.split(model)
    weights = jax.jit(lambda params: prepare_decoding(nnx.merge(graphdef, params)))(params)
    streams = (np.array([256, *text.encode(), 256], np.int32) for text in TEXTS)
    cache, total = model.init_cache(2), 0.0
    for batch in streaming_batches(streams, batch_size=2, length=16):
        sums, cache = decode_batch(graphdef, params, weights, cache, batch)
        total += float(sums.loss_sum)
    assert total == pytest.approx(nats, rel=1e-6)


@pytest.mark.slow
def test_the_loss_with_rounded_numbers_is_near_and_another(model, nats):
    result = evaluate_documents(
        model, ByteTokenizer(), TEXTS, batch_size=2, piece_length=16, weights="int8", kv="int8"
    )
    exact = nats / result.num_tokens
    assert result.num_tokens == sum(len(text.encode()) + 1 for text in TEXTS)
    assert 1e-6 <= abs(result.loss / exact - 1) <= 5e-3


def test_files_are_split_into_documents(model, nats, tmp_path):
    (tmp_path / "a.txt").write_text("\0".join(TEXTS[:4]))
    (tmp_path / "b.txt").write_text("\0".join(TEXTS[4:]))
    result = evaluate_files(
        model, ByteTokenizer(), [str(tmp_path / "*.txt")], document_separator="\0",
        batch_size=2, piece_length=16,
    )  # fmt: skip
    assert result.loss == pytest.approx(nats / result.num_tokens, rel=1e-6)


@pytest.mark.slow
def test_scores_of_tokens_equal_one_call(model):
    """Sequences end in another order than they begin; a row without one ends earlier."""
    streams = [np.array([256, *text.encode()], np.int32) for text in TEXTS]
    found = {
        scores.index: scores
        for scores in score_sequences(model, streams, batch_size=4, piece_length=16)
    }
    assert sorted(found) == list(range(len(streams)))
    graphdef, state = nnx.split(model)
    call = jax.jit(lambda tokens: nnx.merge(graphdef, state)(tokens).logits)
    for index, stream in enumerate(streams):
        padded = np.pad(stream[None], ((0, 0), (0, 100 - len(stream))))
        logits = np.asarray(call(padded), np.float64)[0, : len(stream) - 1]
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = logprobs[np.arange(len(logits)), stream[1:]]
        np.testing.assert_allclose(found[index].logprobs, expected, rtol=1e-5)
        assert np.array_equal(found[index].is_greedy, logits.argmax(-1) == stream[1:])


def test_a_sequence_without_a_prediction_is_an_error(model):
    sequences = [np.arange(3, dtype=np.int32), np.arange(1, dtype=np.int32)]
    with pytest.raises(ValueError, match="sequence 1 has 1 tokens"):
        list(score_sequences(model, sequences, batch_size=4, piece_length=16))


def test_no_text_is_an_error(model, tmp_path):
    with pytest.raises(DataError, match="nothing to evaluate"):
        evaluate_documents(model, ByteTokenizer(), [], piece_length=16)
    with pytest.raises(DataError, match="missing"):
        evaluate_files(model, ByteTokenizer(), [str(tmp_path / "missing.txt")])


def test_batches_have_every_target_once_and_separate_segments():
    streams = [np.arange(1, n + 1, dtype=np.int32) for n in (2, 9, 3, 17, 5)]
    batches = list(streaming_batches(iter(streams), batch_size=2, length=4))
    counted = [batch.targets[batch.weights == 1.0] for batch in batches]
    assert sorted(np.concatenate(counted)) == sorted(
        np.concatenate([stream[1:] for stream in streams])
    )
    for row in range(2):
        joined = [np.concatenate([array[row] for array in arrays]) for arrays in zip(*batches)]
        tokens, targets, segment_ids, weights = joined
        assert np.array_equal(segment_ids != 0, weights == 1.0)
        same = segment_ids[1:] == segment_ids[:-1]
        # Within a document the next input is this target; a new document starts with bos.
        inside = same & (segment_ids[1:] != 0)
        assert np.array_equal(tokens[1:][inside], targets[:-1][inside])
        assert (tokens[1:][~same & (segment_ids[1:] != 0)] == 1).all()
