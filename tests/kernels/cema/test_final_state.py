"""The final state of a row without its outputs, against the float64 recurrence."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cema import CemaParams, cema
from pallas_kernels.cema.final_state import final_state

RUNS = [[(1, 150)], [(0, 3), (1, 80), (2, 60), (0, 7)], [(0, 150)], [(1, 149), (0, 1)]]


def recurrence(x, params, state, segment_ids):
    return cema(
        x, params, initial_state=state, segment_ids=segment_ids, implementation="reference"
    ).final_state


@cache
def compiled_pass(function):
    """Forward and backward pass, compiled once for all cases of one shape."""

    @jax.jit
    def run(x, params, state, segment_ids, cotangent):
        h, pull_back = jax.vjp(lambda *primals: function(*primals, segment_ids), x, params, state)
        return h, pull_back(cotangent)

    return run


def state_and_gradients(function, case, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        complex_dtype = jnp.result_type(dtype, jnp.complex64)
        x = jnp.asarray(case.x, dtype)
        params = CemaParams(*(jnp.asarray(value, dtype) for value in case.params))
        state = None if case.initial_state is None else case.initial_state.astype(complex_dtype)
        ids = None if case.segment_ids is None else jnp.asarray(case.segment_ids, jnp.int32)
        cotangent = case.cot_state.astype(complex_dtype)
        results = compiled_pass(function)(x, params, state, ids, cotangent)
        return [np.asarray(leaf) for leaf in jax.tree.leaves(results)]


@pytest.mark.parametrize("length", [1, 64, 150, 5000])
@pytest.mark.parametrize("with_state", [False, True])
def test_equals_float64_recurrence(length, with_state, make_case):
    check(make_case(4, length, 3, 4, with_state=with_state))


@pytest.mark.parametrize("with_state", [False, True])
def test_packed_rows(with_state, make_case):
    check(make_case(4, 150, 3, 4, with_state=with_state, segment_ids=packed_ids()))


def packed_ids():
    return np.array([np.concatenate([np.full(n, i) for i, n in runs]) for runs in RUNS])


def check(case):
    want = state_and_gradients(recurrence, case, jnp.float64)
    got = state_and_gradients(final_state, case, jnp.float32)
    for value, expected in zip(got, want, strict=True):
        size = np.linalg.norm(expected)
        assert np.linalg.norm(value - expected) <= 3e-6 * size or size == 0


def test_other_documents_and_padding_have_no_influence(make_case):
    ids = packed_ids()
    case = make_case(4, 150, 3, 4, with_state=True, segment_ids=ids)
    is_last = (ids == ids.max(1)[:, None])[..., None]
    poisoned = case._replace(x=np.where(is_last, case.x, np.nan))
    poisoned.x[2] = np.nan
    want, got = (state_and_gradients(final_state, each, jnp.float32) for each in (case, poisoned))
    for value, expected in zip(got, want, strict=True):
        np.testing.assert_array_equal(value, expected)
