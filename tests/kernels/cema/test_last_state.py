"""The state after a row, found without its outputs, against the float64 recurrence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cema import CemaParams, cema
from pallas_kernels.cema.final_state import last_state

RUNS = [[(1, 150)], [(0, 3), (1, 80), (2, 60), (0, 7)], [(0, 150)], [(1, 149), (0, 1)]]


def state_and_gradients(function, case, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        x = jnp.asarray(case.x, dtype)
        params = CemaParams(*(jnp.asarray(value, dtype) for value in case.params))
        state = None
        if case.state is not None:
            state = jnp.asarray(case.state).astype(jnp.result_type(dtype, jnp.complex64))
        ids = None if case.segment_ids is None else jnp.asarray(case.segment_ids, jnp.int32)

        @jax.jit
        def both(x, params, state):
            h, pull_back = jax.vjp(lambda *inputs: function(*inputs, ids), x, params, state)
            return h, pull_back(jnp.asarray(case.cot_state).astype(h.dtype))

        return [np.asarray(leaf) for leaf in jax.tree.leaves(both(x, params, state))]


def recurrence(x, params, state, segment_ids):
    return cema(x, params, state=state, segment_ids=segment_ids, implementation="reference").state


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
    got = state_and_gradients(last_state, case, jnp.float32)
    for mine, due in zip(got, want, strict=True):
        size = np.linalg.norm(due)
        assert np.linalg.norm(mine - due) <= 3e-6 * size or size == 0


def test_what_is_left_out_may_be_anything(make_case):
    ids = packed_ids()
    case = make_case(4, 150, 3, 4, with_state=True, segment_ids=ids)
    loud = case._replace(x=np.where((ids == ids.max(1)[:, None])[..., None], case.x, np.nan))
    loud.x[2] = np.nan
    quiet, loud = (state_and_gradients(last_state, each, jnp.float32) for each in (case, loud))
    for mine, others in zip(quiet, loud, strict=True):
        np.testing.assert_array_equal(mine, others)
