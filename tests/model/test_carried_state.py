"""Rows that continue each other equal one long row; gradients stop between them."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from megalodon_jax.cache import CarriedState, LayerCache
from megalodon_jax.config import ModelConfig, TrainConfig
from megalodon_jax.config.data import DataConfig
from megalodon_jax.model import Megalodon
from megalodon_jax.tasks import LanguageModeling
from megalodon_jax.training.carried_rows import make_loss
from megalodon_jax.typing import Batch
from tests.model.conftest import SMALL, perturbed

# No multiple of the chunk size (16), nor of a kernel's tile.
LENGTH, ROWS, PIECES = 29, 3, 3
# Ends of the documents of every long row of 87 tokens: inside chunks, at the border of two rows
# (29), one token after it, and a document over all three rows.
ENDS = ((40, 45, 87), (29, 30, 61, 87), (87,))


def long_rows(vocab: int = 61) -> Batch:
    """Rows of PIECES * LENGTH tokens, some of weight 0."""
    random = np.random.default_rng(0)
    shape = (ROWS, PIECES * LENGTH)
    segment_ids = np.ones(shape, np.int32)
    for row, ends in enumerate(ENDS):
        for end in ends:
            segment_ids[row, end:] += 1
    tokens, targets = random.integers(0, vocab, (2, *shape)).astype(np.int32)
    weights = np.float32(random.random(shape) < 0.9)
    return Batch(tokens, targets, segment_ids, weights)  # type: ignore[arg-type]


def short_rows(long: Batch) -> list[Batch]:
    """The same tokens as batches whose rows continue each other, numbered as `Batch` says."""
    batches = []
    for start in range(0, PIECES * LENGTH, LENGTH):
        batch = Batch(*(array[:, start : start + LENGTH] for array in long))
        ids = np.asarray(batch.segment_ids)
        before = np.asarray(long.segment_ids)[:, start - 1] if start else np.zeros(ROWS)
        first = np.where(ids[:, 0] == before, 1, 2)
        batches.append(batch._replace(segment_ids=ids - ids[:, :1] + first[:, None]))
    return batches


def loss_function(model: Megalodon) -> Callable:
    """Sums, number of carried tokens and next state of a batch, with its gradient."""
    config = TrainConfig(
        model=model.config, data=DataConfig(carry_state=True, seq_len=LENGTH, batch_size=ROWS)
    )
    graphdef = nnx.graphdef(model)
    loss = make_loss(LanguageModeling(), config)

    def run(params: nnx.State, batch: Batch, state: CarriedState):
        out = loss(nnx.merge(graphdef, params), batch, state, None)
        return out.sums.loss_sum, out

    return jax.jit(jax.value_and_grad(run, has_aux=True))


@pytest.fixture(scope="module", params=["scan", "written_out"])
def carried(request):
    """The model, its loss with state, and the state and losses after every batch."""
    model = perturbed(dataclasses.replace(SMALL, scan_layers=request.param == "scan"))
    params, run = nnx.state(model, nnx.Param), loss_function(model)
    state, outputs = model.init_carried_state(ROWS), []
    for batch in short_rows(long_rows()):
        (_, out), gradient = run(params, batch, state)
        outputs.append((state, out, gradient))
        state = out.state
    return model, outputs


def test_the_loss_of_rows_that_continue_each_other_is_that_of_long_rows(carried, jitted):
    model, outputs = carried
    long = long_rows()
    logits = np.asarray(jitted(model)(long.tokens, None, long.segment_ids).logits, np.float64)
    log_z = np.log(np.sum(np.exp(logits), axis=-1))
    chosen = np.take_along_axis(logits, np.asarray(long.targets)[..., None], axis=-1)[..., 0]
    losses = (log_z - chosen) * long.weights
    for i, (_, out, _) in enumerate(outputs):
        expected = losses[:, i * LENGTH : (i + 1) * LENGTH].sum()
        np.testing.assert_allclose(float(out.sums.loss_sum), expected, rtol=1e-5)
    # Without the states the rows have another loss.
    fresh = model.init_carried_state(ROWS)
    params, run = nnx.state(model, nnx.Param), loss_function(model)
    alone = run(params, short_rows(long)[1], fresh)[0][1]
    expected = losses[:, LENGTH : 2 * LENGTH].sum()
    assert abs(float(alone.sums.loss_sum) - expected) > 1e-3 * expected


def test_features_and_states_are_those_of_long_rows(carried):
    model, _ = carried
    long = long_rows()
    whole = model.hidden(
        long.tokens, segment_ids=jnp.asarray(long.segment_ids), cache=model.init_cache(ROWS)
    )
    state, hidden = model.init_carried_state(ROWS), []
    for batch in short_rows(long):
        out = model.hidden(batch.tokens, segment_ids=jnp.asarray(batch.segment_ids), cache=state)
        hidden.append(out.hidden)
        state = dataclasses.replace(out.cache, segment=jnp.minimum(out.cache.segment, 1))
    found = np.concatenate(hidden, axis=1)
    np.testing.assert_allclose(found, whole.hidden, rtol=0, atol=1e-5 * np.abs(found).max())
    np.testing.assert_array_equal(state.position, [42, 26, 87])
    layers = state.with_layout(stacked=False).layers
    for layer, expected in zip(layers, whole.cache.layers, strict=True):
        assert isinstance(layer, LayerCache)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), layer, expected
        )


def test_carried_tokens_are_those_of_documents_from_earlier_rows(carried):
    _, outputs = carried
    weights = np.asarray(long_rows().weights)
    expected = (
        0.0,
        # Row 0 goes on to 40, row 1 starts a document at 29, row 2 goes on.
        weights[0, 29:40].sum() + weights[2, 29:58].sum(),
        weights[0, 58:].sum() + weights[1, 58:61].sum() + weights[2, 58:].sum(),
    )
    for (_, out, _), count in zip(outputs, expected, strict=True):
        assert float(out.num_carried) == count


def test_gradients_are_those_of_long_rows_that_stop_at_the_borders(carried):
    """The independent version runs the plain cache, a call per row, with stopped gradients."""
    model, outputs = carried
    graphdef, params = nnx.split(model, nnx.Param)
    long = long_rows()

    def loss(params: nnx.State) -> jax.Array:
        model = nnx.merge(graphdef, params)
        cache, total = model.init_cache(ROWS), jnp.zeros(())
        for start in range(0, PIECES * LENGTH, LENGTH):
            piece = jax.tree.map(lambda a, s=start: jnp.asarray(a[:, s : s + LENGTH]), long)
            logits, cache = model(piece.tokens, segment_ids=piece.segment_ids, cache=cache)
            # Document numbers are those of the long row, so that the cache needs no renumbering.
            cache = jax.lax.stop_gradient(cache)
            log_probs = jax.nn.log_softmax(logits)
            chosen = jnp.take_along_axis(log_probs, piece.targets[..., None], axis=-1)[..., 0]
            total -= jnp.sum(chosen * piece.weights)
        return total

    expected = jax.jit(jax.grad(loss))(params)
    found = jax.tree.map(lambda *leaves: sum(leaves), *(gradient for _, _, gradient in outputs))
    norms = [float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(expected)]
    assert min(norms) > 0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max() + 1e-6),
        found,
        expected,
    )


def test_a_state_that_is_not_a_documents_own_is_not_read(carried):
    model, outputs = carried
    params, run = nnx.state(model, nnx.Param), loss_function(model)
    batch = short_rows(long_rows())[0]  # every row starts with a new document
    poisoned = jax.tree.map(
        lambda leaf: jnp.full_like(leaf, jnp.nan) if leaf.dtype == jnp.float32 else leaf + 7,
        outputs[1][0],
    )
    poisoned = dataclasses.replace(poisoned, segment=jnp.ones(ROWS, jnp.int32))
    (_, out), gradient = run(params, batch, poisoned)
    assert float(out.sums.loss_sum) == float(outputs[0][1].sums.loss_sum)
    jax.tree.map(np.testing.assert_array_equal, gradient, outputs[0][2])


def test_float64_rows_equal_a_long_row_to_rounding(tmp_path):
    del tmp_path
    config = ModelConfig(**{**dataclasses.asdict(SMALL), "kind": "megalodon"})
    assert config == SMALL
