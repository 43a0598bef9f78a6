"""Sliced cross-entropy against the plain formula in float64."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from megalodon_jax.loss import cross_entropy
from tests.golden_files import relative_error

B, L, D, V = 3, 37, 8, 29


def plain(hidden, matrix, targets, weights, z_loss):
    logits = hidden @ matrix
    log_z = jax.nn.logsumexp(logits, -1)
    chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return jnp.sum(weights * (log_z - chosen + z_loss * log_z**2))


@pytest.mark.parametrize("chunk_size", [1, 12, 40, 10_000])
def test_sums_and_gradients(chunk_size: int):
    rng = np.random.default_rng(0)
    hidden, matrix = rng.normal(size=(B, L, D)), rng.normal(size=(D, V))
    targets = rng.integers(0, V, (B, L)).astype(np.int32)
    weights = rng.integers(0, 3, (B, L)).astype(np.float64)
    with jax.enable_x64(True):
        expected, expected_gradients = jax.value_and_grad(plain, (0, 1))(
            *map(jnp.asarray, (hidden, matrix, targets, weights)), 0.01
        )
        expected_gradients = jax.tree.map(np.asarray, expected_gradients)

    def total(hidden, matrix):
        sums = cross_entropy(hidden, matrix, targets, weights, z_loss=0.01, chunk_size=chunk_size)
        return sums.loss_sum + sums.z_loss_sum, sums

    (value, sums), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(
        jnp.asarray(hidden, jnp.float32), jnp.asarray(matrix, jnp.float32)
    )
    assert abs(float(value) / float(expected) - 1) <= 1e-6
    assert float(sums.weight_sum) == weights.sum()
    correct = (weights * ((hidden @ matrix).argmax(-1) == targets)).sum()
    assert float(sums.correct_sum) == correct
    for gradient, expected_gradient in zip(gradients, expected_gradients):
        assert relative_error(gradient, expected_gradient) <= 1e-6


@pytest.mark.parametrize("field", ["loss_sum", "z_loss_sum", "weight_sum"])
def test_every_sum_has_its_gradients(field):
    rng = np.random.default_rng(1)
    targets = rng.integers(0, V, (B, L)).astype(np.int32)
    arrays = rng.normal(size=(B, L, D)), rng.normal(size=(D, V)), rng.uniform(1, 2, (B, L))

    def by_hand(hidden, matrix, weights):
        log_z = jax.nn.logsumexp(hidden @ matrix, -1)
        chosen = jnp.take_along_axis(hidden @ matrix, targets[..., None], -1)[..., 0]
        terms = {"loss_sum": log_z - chosen, "z_loss_sum": 0.1 * log_z**2, "weight_sum": 1.0}
        return jnp.sum(weights * terms[field])

    def sliced(hidden, matrix, weights):
        return getattr(
            cross_entropy(hidden, matrix, targets, weights, z_loss=0.1, chunk_size=20), field
        )

    with jax.enable_x64(True):
        expected = jax.tree.map(np.asarray, jax.grad(by_hand, (0, 1, 2))(*map(jnp.asarray, arrays)))
    actual = jax.grad(sliced, (0, 1, 2))(*(jnp.asarray(a, jnp.float32) for a in arrays))
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def test_bfloat16_gradients_have_bfloat16_accuracy():
    rng = np.random.default_rng(2)
    targets = rng.integers(0, V, (B, L)).astype(np.int32)
    arrays = [jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((B, L, D), (D, V))]
    weights = jnp.ones((B, L))

    def total(hidden, matrix):
        return cross_entropy(hidden, matrix, targets, weights, chunk_size=20).loss_sum

    low = jax.grad(total, (0, 1))(*arrays)
    full = jax.grad(total, (0, 1))(*(a.astype(jnp.float32) for a in arrays))
    for got, expected in zip(low, full, strict=True):
        assert got.dtype == jnp.bfloat16
        assert relative_error(np.asarray(got, np.float32), expected) <= 4e-3


def test_logits_of_the_whole_batch_are_not_stored():
    shapes = (jnp.zeros((2, 512, 16)), jnp.zeros((16, 4096)))
    targets, weights = jnp.zeros((2, 512), jnp.int32), jnp.ones((2, 512))

    def total(hidden, matrix):
        return cross_entropy(hidden, matrix, targets, weights, chunk_size=64).loss_sum

    compiled = jax.jit(jax.grad(total, (0, 1))).lower(*shapes).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 2 * 512 * 4096 * 4 / 4


def test_weight_zero_masks_a_token_that_is_not_finite():
    hidden = jnp.zeros((1, 4, D)).at[0, 1].set(jnp.inf)
    weights = jnp.array([[1.0, 0.0, 1.0, 1.0]])
    sums = cross_entropy(hidden, jnp.ones((D, V)), jnp.zeros((1, 4), jnp.int32), weights)
    assert abs(float(sums.loss_sum) - 3 * np.log(V)) <= 1e-5
    gradients = jax.grad(
        lambda h: (
            cross_entropy(
                h, jnp.ones((D, V)), jnp.zeros((1, 4), jnp.int32), weights, z_loss=0.1
            ).loss_sum
        )
    )(hidden)
    assert jnp.isfinite(gradients).all()
