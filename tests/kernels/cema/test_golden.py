"""CEMA equals the authors' CUDA code."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cema import CemaParams, cema

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "ops_cema.npz"
CASES = [
    "B2_L1_D16_N16", "B2_L1_D16_N16_hx", "B2_L7_D16_N16", "B2_L7_D16_N16_hx", "B2_L64_D16_N16",
    "B2_L64_D16_N16_hx", "B2_L200_D16_N16", "B2_L200_D16_N16_hx", "B2_L1000_D16_N16",
    "B2_L1000_D16_N16_hx", "B1_L64_D16_N16_hx", "B1_L200_D16_N16_hx", "B9_L64_D16_N16_hx",
    "B9_L40_D16_N16", "B2_L200_D16_N8_hx", "B2_L128_D16_N8",
]  # fmt: skip


def test_every_golden_case_is_listed():
    with np.load(GOLDEN) as arrays:
        assert sorted(CASES) == sorted(json.loads(str(arrays["__meta__"]))["cases"])


# Nearly all of the time is LLVM's; test_contract.py compiles with its optimizations.
@partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def outputs_and_pull_back(implementation, x, params, state, cot_y, cot_state):
    out, pull_back = jax.vjp(
        lambda x, params, state: cema(
            x, params, initial_state=state, implementation=implementation
        ),
        x,
        params,
        state,
    )
    return out, pull_back(type(out)(cot_y, cot_state))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_released_code(case, implementation, relative_error):
    with np.load(GOLDEN) as arrays:
        golden = {
            name.removeprefix(f"{case}/"): arrays[name]
            for name in arrays
            if name.startswith(f"{case}/")
        }
    params = CemaParams(
        alpha=jnp.asarray(golden["param:alpha"][..., 0]),
        delta=jnp.asarray(golden["param:delta"][..., 0]),
        theta=jnp.asarray(golden["param:theta"][:, 0, 0]),
        gamma=jnp.asarray(golden["param:gamma"]),
        omega=jnp.asarray(golden["param:omega"][:, 0]),
    )
    x = jnp.asarray(golden["x"].transpose(0, 2, 1))
    state = jnp.asarray(golden["hx"]) if "hx" in golden else None
    cot_y = jnp.asarray(golden["cot_y"].transpose(0, 2, 1))
    cot_state = jnp.conj(jnp.asarray(golden["cot_h"]))  # torch's convention

    # Cases without a state start from zeros, so that cases of one shape share a compilation.
    start = jnp.zeros_like(cot_state) if state is None else state
    out, y_gradients = outputs_and_pull_back(
        implementation, x, params, start, cot_y, jnp.zeros_like(cot_state)
    )
    _, state_gradients = outputs_and_pull_back(
        implementation, x, params, start, jnp.zeros_like(cot_y), cot_state
    )
    assert relative_error(np.asarray(out.y).transpose(0, 2, 1), golden["y"]) <= 1e-6
    assert relative_error(np.asarray(out.final_state), golden["h_last"]) <= 1e-6
    checked = 0
    for kind, (dx, dparams, dstate) in (("y", y_gradients), ("h", state_gradients)):
        got = {
            "x": dx.transpose(0, 2, 1),
            "alpha": dparams.alpha[..., None],
            "delta": dparams.delta[..., None],
            "theta": dparams.theta[:, None, None],
            "gamma": dparams.gamma,
            "omega": dparams.omega[:, None],
        }
        if state is not None:
            got["hx"] = jnp.conj(dstate)
        for name, value in got.items():
            want = golden.get(f"grad_{kind}:{name}")
            if want is None:  # the released code does not compute it
                continue
            error = relative_error(np.asarray(value), want)
            assert error <= _tolerance(kind, name, golden), f"grad_{kind}:{name} {error:.1e}"
            checked += 1
    assert checked >= 6


def _tolerance(kind: str, name: str, golden: dict[str, np.ndarray]) -> float:
    # The gradient h_last -> hx is conj(q)^L: the released code's rounding of log q, times L.
    # Against float64 the golden numbers are off by 5.8e-6 at L = 64 and 1.7e-5 at L = 200.
    if kind == "h" and name == "hx" and golden["x"].shape[-1] >= 64:
        return 4e-5
    return 5e-6
