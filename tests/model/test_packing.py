"""Packed documents equal separate documents: logits, loss and all gradients."""

from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.loss import cross_entropy
from megalodon_jax.model import Megalodon
from tests.golden_files import relative_error

# Documents shorter and longer than a chunk (16), and of one token; row 1 ends in padding. Few
# different lengths limit the number of compiled shapes.
LENGTHS = [[20, 33, 1, 20], [33, 33]]
L = 74


def packed(rng: np.random.Generator):
    documents = [[rng.integers(0, 61, n + 1).astype(np.int32) for n in row] for row in LENGTHS]
    tokens, targets, segment_ids = (np.zeros((2, L), np.int32) for _ in range(3))
    for b, row in enumerate(documents):
        start = 0
        for number, document in enumerate(row, 1):
            columns = slice(start, start + len(document) - 1)
            tokens[b, columns], targets[b, columns] = document[:-1], document[1:]
            segment_ids[b, columns] = number
            start = columns.stop
    return documents, tokens, targets, segment_ids


def loss_sum(graphdef, params, tokens, targets, segment_ids):
    model = nnx.merge(graphdef, params)
    hidden, _ = model.hidden(tokens, segment_ids=segment_ids)
    weights = jnp.ones(tokens.shape) if segment_ids is None else (segment_ids > 0) * 1.0
    return cross_entropy(hidden, model.output_matrix(), targets, weights).loss_sum


@pytest.mark.slow
def test_packed_loss_and_gradients_equal_separate_ones(small_model_with_prior: Megalodon):
    model = small_model_with_prior
    documents, tokens, targets, segment_ids = packed(np.random.default_rng(2))
    graphdef, params = nnx.split(model)

    @jax.jit
    def loss_and_gradients(params, tokens, targets, segment_ids):
        total = partial(loss_sum, graphdef)
        return jax.value_and_grad(total)(params, tokens, targets, segment_ids)

    separately = [
        loss_and_gradients(params, document[None, :-1], document[None, 1:], None)
        for row in documents
        for document in row
    ]
    expected, expected_gradients = jax.tree.map(lambda *terms: sum(terms), *separately)
    loss, gradients = loss_and_gradients(params, tokens, targets, segment_ids)
    assert abs(float(loss) - float(expected)) <= 1e-6 * float(expected)
    for (path, gradient), (_, expected_gradient) in zip(
        jax.tree.leaves_with_path(gradients), jax.tree.leaves_with_path(expected_gradients)
    ):
        assert relative_error(gradient, expected_gradient) <= 1e-5, jax.tree_util.keystr(path)


@pytest.mark.slow
def test_packed_logits_equal_separate_ones(jitted, small_model: Megalodon):
    documents, tokens, _, segment_ids = packed(np.random.default_rng(2))
    call = jitted(small_model)
    logits, _ = call(tokens, segment_ids=segment_ids)
    start = 0
    for document in documents[0]:
        length = len(document) - 1
        # Padding at the right has no effect on the tokens before it; one shape is compiled.
        padded = np.zeros((2, L), np.int32)
        padded[0, :length] = document[:-1]
        expected = call(padded).logits[:1, :length]
        assert relative_error(logits[:1, start : start + length], expected) <= 2e-6
        start += length


def test_documents_do_not_affect_each_other(jitted, small_model: Megalodon):
    _, tokens, _, segment_ids = packed(np.random.default_rng(3))
    logits, _ = jitted(small_model)(tokens, segment_ids=segment_ids)
    changed = np.where((segment_ids == 1) | (segment_ids == 3), (tokens + 7) % 61, tokens)
    changed_logits, _ = jitted(small_model)(changed, segment_ids=segment_ids)
    unchanged = (segment_ids == 2) | (segment_ids == 4)
    np.testing.assert_array_equal(
        np.asarray(logits)[unchanged], np.asarray(changed_logits)[unchanged]
    )
    assert not np.array_equal(
        np.asarray(logits)[~unchanged], np.asarray(changed_logits)[~unchanged]
    )


def test_one_segment_equals_no_segment_ids(jitted, small_model: Megalodon):
    tokens = np.random.default_rng(4).integers(0, 61, (2, L)).astype(np.int32)
    plain, _ = jitted(small_model)(tokens)
    ones, _ = jitted(small_model)(tokens, segment_ids=np.ones((2, L), np.int32))
    assert relative_error(ones, plain) <= 2e-6
