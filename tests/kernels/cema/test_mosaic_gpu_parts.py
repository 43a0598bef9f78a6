"""Hopper's kernels on a sequence that several devices share, against the recurrence on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cema import CemaParams, cema, mosaic_gpu_stream
from pallas_kernels.common.target import interpreted
from tests.kernels.parts import at_last_part, from_parts, in_turn, to_parts

PARTS = 2
# As test_contract.py asks of these kernels.
OF_OUTPUTS, OF_GRADIENTS = 3e-6, 1e-5
# Rows of 128 tokens over two parts: a document within a part, across the border, from one part's
# start, up to one's end; padding at an end, at a start, for a whole part.
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
def one_part_after_another(monkeypatch):
    monkeypatch.setattr(mosaic_gpu_stream, "launch", in_turn(mosaic_gpu_stream.launch))


def outputs_and_gradients(case, **options):
    """Of one part: y, its gradients, and those of its row's last state with `axis`."""
    axis = options.get("sequence_axis")

    def run(x, ids, cot_y, cot_state, params):
        def total(x, params):
            y, state = cema(x, params, segment_ids=ids, **options)
            return jnp.sum(y * cot_y) + jnp.sum((state * cot_state).real), y

        (_, y), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(x, params)
        return y, *gradients

    ids = None if case.segment_ids is None else jnp.asarray(case.segment_ids)
    arrays = jnp.asarray(case.x, jnp.float32), ids, jnp.asarray(case.cot_y, jnp.float32)
    state = jnp.asarray(case.cot_state, jnp.complex64)
    params = CemaParams(*(jnp.asarray(value, jnp.float32) for value in case.params))
    if axis is None:
        return jax.jit(run)(*arrays, state, params)
    split = [to_parts(a, PARTS) for a in arrays]
    axes = [None if a is None else 0 for a in arrays]
    run_parts = jax.vmap(run, axis_name=axis, in_axes=(*axes, 0, None))
    y, dx, d_params = jax.jit(run_parts)(*split, at_last_part(state, PARTS), params)
    return from_parts(y), from_parts(dx), jax.tree.map(lambda leaf: leaf.sum(axis=0), d_params)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "split", "packed", "with_state"),
    [(128, 32, True, False), (192, 64, False, True)],
)
def test_parts_equal_the_recurrence(
    length, split, packed, with_state, make_case, one_part_after_another, relative_error
):
    ids = segment_ids() if packed else None
    case = make_case(len(RUNS) if packed else 1, length, 3, 2, segment_ids=ids)
    if not with_state:
        case = case._replace(cot_state=np.zeros_like(case.cot_state))
    due = outputs_and_gradients(case, implementation="reference")
    options = {"implementation": "mosaic_gpu", "block_size": split, "sequence_axis": "chunk"}
    with interpreted():
        found = outputs_and_gradients(case, **options)
    leaves = zip(jax.tree.leaves(found), jax.tree.leaves(due), strict=True)
    errors = [relative_error(np.asarray(mine), np.asarray(expected)) for mine, expected in leaves]
    assert errors[0] <= OF_OUTPUTS, errors
    assert max(errors) <= OF_GRADIENTS, errors
