"""Rows that continue each other equal one long row; gradients stop between them."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from megalodon_jax.cache import MAX_POSITION, Cache, CarriedState, LayerCache
from megalodon_jax.config import DataConfig, TrainConfig
from megalodon_jax.model import Megalodon
from megalodon_jax.tasks import LanguageModeling
from megalodon_jax.training.carried_rows import RowsLoss, make_loss
from megalodon_jax.typing import Batch
from tests.model.conftest import SMALL, perturbed

pytestmark = pytest.mark.slow

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


def with_settings(model: Megalodon, **settings: Any) -> Megalodon:
    """A model with the same parameters that is computed in another way."""
    config = dataclasses.replace(model.config, **settings)
    abstract = nnx.eval_shape(lambda: Megalodon(config, rngs=nnx.Rngs(0)))
    return nnx.merge(nnx.graphdef(abstract), nnx.state(model, nnx.Param))


class Rows(NamedTuple):
    """A model on rows that continue each other, and on long rows with a plain cache.

    Attributes:
      model: the model.
      run: the jitted loss of a batch with its gradient.
      states: before every batch, and after the last one.
      outputs: the loss of every batch.
      gradients: its gradient.
      losses: of every token of the long rows, float64.
      cache: after the long rows.
    """

    model: Megalodon
    run: Callable
    states: list[CarriedState]
    outputs: list[RowsLoss]
    gradients: list[nnx.State]
    losses: np.ndarray
    cache: Cache


@pytest.fixture(
    scope="module", params=["scan", pytest.param("written_out", marks=pytest.mark.slow)]
)
def rows(request, jitted) -> Rows:
    model = perturbed(dataclasses.replace(SMALL, scan_layers=request.param == "scan"))
    params, run, long = nnx.state(model, nnx.Param), loss_function(model), long_rows()
    states, outputs, gradients = [model.init_carried_state(ROWS)], [], []
    for batch in short_rows(long):
        (_, out), gradient = run(params, batch, states[-1])
        states.append(out.state)
        outputs.append(out)
        gradients.append(gradient)
    logits, cache = jitted(model)(long.tokens, model.init_cache(ROWS), long.segment_ids)
    logits = np.asarray(logits, np.float64)
    log_z = np.log(np.sum(np.exp(logits), axis=-1))
    chosen = np.take_along_axis(logits, np.asarray(long.targets)[..., None], axis=-1)[..., 0]
    return Rows(model, run, states, outputs, gradients, (log_z - chosen) * long.weights, cache)


def test_the_loss_of_rows_that_continue_each_other_is_that_of_long_rows(rows):
    expected = rows.losses.reshape(ROWS, PIECES, LENGTH).sum(axis=(0, 2))
    found = [float(out.sums.loss_sum) for out in rows.outputs]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # Without the state a row has another loss.
    params = nnx.state(rows.model, nnx.Param)
    alone = rows.run(params, short_rows(long_rows())[1], rows.states[0])[0][0]
    assert abs(float(alone) - expected[1]) > 1e-3 * expected[1]


def test_states_after_the_rows_are_those_after_the_long_rows(rows):
    state = rows.states[-1].with_layout(stacked=False)
    np.testing.assert_array_equal(state.position, [42, 26, 87])
    np.testing.assert_array_equal(state.segment, 1)
    for layer, expected in zip(state.layers, rows.cache.layers, strict=True):
        assert isinstance(layer, LayerCache)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), layer, expected
        )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        state.final_norm,
        rows.cache.final_norm,
    )


def test_carried_tokens_are_those_of_documents_from_earlier_rows(rows):
    weights = np.asarray(long_rows().weights)
    expected = (
        0.0,
        # Row 0 goes on to 40, row 1 starts a document at 29, row 2 goes on.
        weights[0, 29:40].sum() + weights[2, 29:58].sum(),
        weights[0, 58:].sum() + weights[1, 58:61].sum() + weights[2, 58:].sum(),
    )
    np.testing.assert_array_equal([float(out.num_carried) for out in rows.outputs], expected)


def test_gradients_are_those_of_long_rows_that_stop_at_the_borders(rows):
    """The independent version: definitions of the operations, the plain cache, a call per row."""
    model = with_settings(rows.model, implementation="reference")
    graphdef, params = nnx.split(model, nnx.Param)
    long = long_rows()

    pieces = jax.tree.map(
        lambda a: jnp.stack([a[:, i * LENGTH : (i + 1) * LENGTH] for i in range(PIECES)]), long
    )

    def loss(params: nnx.State) -> jax.Array:
        model = nnx.merge(graphdef, params)

        def add(cache: Cache, piece: Batch) -> tuple[Cache, jax.Array]:
            # Document numbers are those of the long row: the cache knows which one goes on.
            logits, cache = model(piece.tokens, segment_ids=piece.segment_ids, cache=cache)
            log_probs = jax.nn.log_softmax(logits)
            chosen = jnp.take_along_axis(log_probs, piece.targets[..., None], axis=-1)[..., 0]
            return jax.lax.stop_gradient(cache), -jnp.sum(chosen * piece.weights)

        return jnp.sum(jax.lax.scan(add, model.init_cache(ROWS), pieces)[1])

    expected = jax.jit(jax.grad(loss))(params)
    found = jax.tree.map(lambda *leaves: sum(leaves), *rows.gradients)
    assert min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected)) > 0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max()),
        found,
        expected,
    )


def test_rematerialization_changes_no_gradient(rows):
    model = with_settings(rows.model, remat="block")
    batch = short_rows(long_rows())[1]
    (loss, out), gradient = loss_function(model)(nnx.state(model, nnx.Param), batch, rows.states[1])
    np.testing.assert_allclose(loss, rows.outputs[1].sums.loss_sum, rtol=1e-6)
    np.testing.assert_array_equal(out.state.position, rows.states[2].position)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max()),
        gradient,
        rows.gradients[1],
    )


def test_a_new_document_reads_nothing_of_the_state(rows):
    params, batch = nnx.state(rows.model, nnx.Param), short_rows(long_rows())[0]
    poisoned = jax.tree.map(
        lambda leaf: jnp.full_like(leaf, jnp.nan) if leaf.dtype == jnp.float32 else leaf + 7,
        rows.states[1],
    )
    poisoned = dataclasses.replace(poisoned, segment=jnp.ones(ROWS, jnp.int32))
    (loss, _), gradient = rows.run(params, batch, poisoned)
    assert float(loss) == float(rows.outputs[0].sums.loss_sum)
    jax.tree.map(np.testing.assert_array_equal, gradient, rows.gradients[0])


def test_a_document_begins_anew_before_its_position_overflows(rows):
    params, batch = nnx.state(rows.model, nnx.Param), short_rows(long_rows())[1]
    state = dataclasses.replace(
        rows.states[1], position=jnp.array([MAX_POSITION - LENGTH + 1, 3, 4], jnp.int32)
    )
    (_, out), _ = rows.run(params, batch, state)
    assert int(out.state.position[0]) < LENGTH
    weights = np.asarray(long_rows().weights)
    assert float(out.num_carried) == weights[2, 29:58].sum()
