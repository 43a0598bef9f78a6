"""CEMA's GPU kernels under context parallelism, against the recurrence on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cema import CemaParams, cema
from pallas_kernels.common import mosaic_gpu
from pallas_kernels.common.target import interpreted
from tests.kernels.context_parallel import (
    at_last_shard,
    from_shards,
    one_shard_at_a_time,
    to_shards,
)

SHARDS = 2
# Those of test_contract.py for these kernels.
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 3e-6, 1e-5
# Rows of 128 tokens over two shards: documents inside one shard, across shards, from the start of
# one, up to its end; padding at an end, at a start, and in a whole shard.
RUNS = [
    [(1, 128)],
    [(1, 5), (2, 70), (3, 53)],
    [(0, 7), (1, 57), (2, 40), (0, 24)],
    [(1, 40), (0, 24), (2, 64)],
    [(1, 64), (0, 64)],
]


def segment_ids():
    return np.array([np.concatenate([np.full(n, i) for i, n in runs]) for runs in RUNS], np.int32)


@pytest.fixture
def sequential_shards(monkeypatch):
    """The interpreter knows one device: the kernels of the shards run one after another."""
    monkeypatch.setattr(mosaic_gpu, "launch", one_shard_at_a_time(mosaic_gpu.launch))


def outputs_and_gradients(case, **options):
    """y, and gradients of Σ y·cot_y + Re Σ final_state·cot_state; over shards if asked for."""
    axis = options.get("sequence_axis")

    def run(x, ids, cot_y, cot_state, params):
        def total(x, params):
            out = cema(x, params, segment_ids=ids, **options)
            return jnp.sum(out.y * cot_y) + jnp.sum((out.final_state * cot_state).real), out.y

        (_, y), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(x, params)
        return y, *gradients

    ids = None if case.segment_ids is None else jnp.asarray(case.segment_ids)
    arrays = jnp.asarray(case.x, jnp.float32), ids, jnp.asarray(case.cot_y, jnp.float32)
    state = jnp.asarray(case.cot_state, jnp.complex64)
    params = CemaParams(*(jnp.asarray(value, jnp.float32) for value in case.params))
    if axis is None:
        return jax.jit(run)(*arrays, state, params)
    shards = [to_shards(a, SHARDS) for a in arrays]
    axes = [None if a is None else 0 for a in arrays]
    run_shards = jax.vmap(run, axis_name=axis, in_axes=(*axes, 0, None))
    y, dx, d_params = jax.jit(run_shards)(*shards, at_last_shard(state, SHARDS), params)
    return from_shards(y), from_shards(dx), jax.tree.map(lambda leaf: leaf.sum(axis=0), d_params)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
@pytest.mark.parametrize(
    ("length", "block_size", "packed", "with_state"),
    [(128, 32, True, False), (192, 64, False, True)],
)
def test_shards_equal_the_recurrence(
    implementation,
    length,
    block_size,
    packed,
    with_state,
    make_case,
    sequential_shards,
    relative_error,
):
    ids = segment_ids() if packed else None
    case = make_case(len(RUNS) if packed else 1, length, 3, 2, segment_ids=ids)
    if not with_state:
        case = case._replace(cot_state=np.zeros_like(case.cot_state))
    want = outputs_and_gradients(case, implementation="reference")
    options = {"implementation": implementation, "block_size": block_size, "sequence_axis": "chunk"}
    with interpreted():
        got = outputs_and_gradients(case, **options)
    leaves = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    errors = [relative_error(np.asarray(value), np.asarray(expected)) for value, expected in leaves]
    assert errors[0] <= OUTPUT_TOLERANCE, errors
    assert max(errors) <= GRADIENT_TOLERANCE, errors
