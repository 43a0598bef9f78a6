"""Bidirectional CEMA against the direct double sum, alone and sharded."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels.cema import CemaParams, bidirectional_cema

D, N, LENGTH = 3, 2, 32
# Documents and padding of rows; sequence shards of 8 tokens cut them.
DOCUMENTS = [
    [(1, 32)],
    [(1, 5), (2, 22), (3, 5)],
    [(1, 7), (0, 10), (2, 9), (0, 6)],
    [(0, 8), (1, 8), (2, 1), (3, 15)],
]


def segment_ids() -> np.ndarray:
    return np.array(
        [np.concatenate([np.full(n, i) for i, n in row]) for row in DOCUMENTS], np.int32
    )


def draw(seed: int = 0, rows: int = len(DOCUMENTS)) -> tuple[Any, np.ndarray, np.ndarray]:
    """Parameters, x and a cotangent in float64."""
    rng = np.random.default_rng(seed)
    shapes = ((2 * D, N), (2 * D, N), (2 * D,), (2 * D, N, 2), (D,))
    means = (0.0, -2.0, -1.0, 0.0, 0.0)
    params = CemaParams(*(rng.normal(m, 1.0, s) for m, s in zip(means, shapes, strict=True)))  # type: ignore[arg-type]
    x, cotangent = rng.normal(size=(2, rows, LENGTH, D))
    return params, x, cotangent


def double_sum(x: Any, params: CemaParams, ids: np.ndarray) -> jax.Array:
    """The definition in JAX, from kernels and one sum over all pairs of tokens."""
    p, damping = jax.nn.sigmoid(params.alpha), jax.nn.sigmoid(params.delta)
    turn = jax.nn.sigmoid(params.theta)[:, None] * 2 * jnp.pi / N * jnp.arange(1, N + 1)
    log_q = jnp.log(1 - p * damping) + 1j * turn
    weights = (params.gamma[..., 0] + 1j * params.gamma[..., 1]) / math.sqrt(N) * p
    lags = jnp.arange(x.shape[1])
    kernel = jnp.real(jnp.einsum("dn,dnj->dj", weights, jnp.exp(log_q[..., None] * lags)))
    lag = lags[:, None] - lags[None, :]
    forward = jnp.where(lag >= 0, kernel[:D][:, jnp.abs(lag)], 0)
    backward = jnp.where(lag < 0, kernel[D:][:, jnp.maximum(-lag - 1, 0)], 0)
    same = (ids[:, :, None] == ids[:, None, :]) & (ids[:, :, None] != 0)
    y = jnp.einsum("dts,bts,bsd->btd", forward + backward, same.astype(x.dtype), x)
    return y + jnp.where((ids != 0)[..., None], params.omega * x, 0)


def value_and_gradients(function, x, params, cotangent):
    def total(x, params):
        y = function(x, params)
        return jnp.sum(y * cotangent), y

    (_, y), gradients = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(x, params)
    return jax.tree.leaves((y, gradients))


def relative(actual, expected):
    return np.linalg.norm(np.asarray(actual) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("packed", [False, True])
def test_equals_the_double_sum_with_gradients(implementation: Any, packed: bool):
    params, x, cotangent = draw()
    ids = segment_ids()
    with jax.enable_x64(True):
        given = ids if packed else np.ones_like(ids)
        expected = value_and_gradients(lambda x, p: double_sum(x, p, given), x, params, cotangent)
        found = value_and_gradients(
            lambda x, p: bidirectional_cema(
                x, p, segment_ids=ids if packed else None, implementation=implementation
            ),
            x,
            params,
            cotangent,
        )
        for actual, wanted in zip(found, expected, strict=True):
            assert relative(actual, np.asarray(wanted)) <= 1e-11


def test_the_backward_average_is_the_mirrored_forward_one_of_the_next_token():
    params, x, _ = draw(1)
    x, run = np.float32(x), jax.jit(bidirectional_cema)
    params = CemaParams(*(np.float32(value) for value in params))  # type: ignore[arg-type]
    swapped = CemaParams(*(np.roll(value, D, axis=0) for value in params[:4]), params.omega)  # type: ignore[arg-type]

    def half(params: CemaParams, x: np.ndarray, direction: int) -> np.ndarray:
        gamma = params.gamma.copy()
        gamma[D:] *= direction == 1
        gamma[:D] *= direction == 0
        return np.asarray(run(x, params._replace(gamma=gamma, omega=0 * params.omega)))

    mirrored = half(swapped, x[:, ::-1], 0)[:, ::-1]
    backward = half(params, x, 1)
    np.testing.assert_allclose(backward[:, :-1], mirrored[:, 1:], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(backward[:, -1], 0, atol=1e-6)


@pytest.mark.slow
def test_packed_documents_are_computed_alone_and_padding_changes_nothing():
    params, x, _ = draw(2)
    params = CemaParams(*(np.float32(value) for value in params))  # type: ignore[arg-type]
    x, ids = np.float32(x), segment_ids()
    run = jax.jit(bidirectional_cema)
    packed = np.asarray(run(np.where((ids == 0)[..., None], np.nan, x), params, segment_ids=ids))
    assert not packed[ids == 0].any()
    documents = [(row, number) for row in range(len(ids)) for number in set(ids[row]) - {0}]
    for row, number in documents:
        tokens = ids[row] == number
        alone = run(x[row : row + 1, tokens], params)
        assert relative(packed[row, tokens], np.asarray(alone[0])) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_sequence_shards_equal_one_device(packed: bool):
    params, x, cotangent = draw(3)
    params = CemaParams(*(np.float32(value) for value in params))  # type: ignore[arg-type]
    x, cotangent, ids = np.float32(x), np.float32(cotangent), segment_ids()
    rows, whole = PartitionSpec(None, "chunk"), PartitionSpec()
    mesh = Mesh(np.array(jax.devices()[:4]), ("chunk",))

    def run(x, params, ids, axis):
        given = ids if packed else None
        return bidirectional_cema(x, params, segment_ids=given, sequence_axis=axis)

    sharded = jax.shard_map(
        lambda x, params, ids: run(x, params, ids, "chunk"),
        mesh=mesh,
        in_specs=(rows, CemaParams(*[whole] * 5), rows),
        out_specs=rows,
        check_vma=False,
    )
    expected = value_and_gradients(lambda x, p: run(x, p, ids, None), x, params, cotangent)
    found = value_and_gradients(lambda x, p: sharded(x, p, ids), x, params, cotangent)
    for actual, wanted in zip(found, expected, strict=True):
        assert relative(actual, np.asarray(wanted)) <= 5e-6


def test_parameters_of_one_direction_are_refused():
    params, x, _ = draw()
    one = CemaParams(*(value[:D] for value in params))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"alpha shape \(3, 2\).*two directions need alpha \(6, N"):
        bidirectional_cema(np.float32(x), one)
