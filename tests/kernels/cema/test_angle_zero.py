"""CEMA at angle 0 (theta = -inf), which is the real average EMA, in every implementation."""

import jax.numpy as jnp
import numpy as np
import pytest

# Two documents and padding; the shape of the contract's packed rows.
SEGMENT_IDS = np.repeat([[1, 2, 0], [1, 1, 1], [0, 1, 2]], [20, 30, 15], axis=1)
# Hopper kernels divide by Im q, or by 2^-40 where it is smaller, as here.
TOLERANCES = {"reference": (1e-6, 3e-6), "xla": (5e-7, 3e-6), "mosaic_gpu": (3e-6, 1e-5)}
CASES = [
    pytest.param("reference", 3, 65, 2),
    pytest.param("xla", 3, 65, 2),
    pytest.param("mosaic_gpu", 3, 65, 2, marks=pytest.mark.slow),
    pytest.param("pallas_tpu", 3, 65, 2, marks=pytest.mark.device_only),
]


@pytest.mark.parametrize(("implementation", "rows", "length", "order"), CASES)
def test_equals_float64_recurrence(
    implementation, rows, length, order, make_case, outputs_and_gradients, relative_error
):
    case = make_case(rows, length, 3, order, with_state=True, segment_ids=SEGMENT_IDS)
    alpha, delta, theta, gamma, omega = case.params
    real_gamma = gamma * np.array([1.0, 0.0])
    case = case._replace(
        params=(alpha, delta, np.full_like(theta, -np.inf), real_gamma, omega),
        initial_state=case.initial_state.real.astype(complex),
        cot_state=case.cot_state.real.astype(complex),
    )
    want = outputs_and_gradients(case, jnp.float64, implementation="reference", llvm_level=3)
    got = outputs_and_gradients(case, jnp.float32, implementation=implementation, llvm_level=3)
    assert not want["dtheta"].any()
    # The imaginary part of gamma is not a parameter of EMA.
    want["dgamma"], got["dgamma"] = want["dgamma"][..., 0], got["dgamma"][..., 0]
    forward, backward = TOLERANCES.get(implementation, TOLERANCES["xla"])
    for name, value in want.items():
        assert np.isfinite(got[name]).all(), name
        tolerance = backward if name.startswith("d") else forward
        assert relative_error(got[name], value) <= tolerance, name
