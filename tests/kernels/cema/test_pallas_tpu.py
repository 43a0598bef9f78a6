"""The TPU kernels in the TPU interpreter, against the float64 recurrence."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.cema import CemaParams, cema
from pallas_kernels.cema.pallas_tpu.block_sizes import TILES, tile_for
from pallas_kernels.cema.pallas_tpu.op import cema_pallas_tpu

# Two tiles of 1,024 tokens: many boundaries in a block, padding at both ends, rows of one document
# and of none. The last row has its boundaries in the second tile.
PACKED = np.stack(
    [
        np.repeat(ids, lengths)
        for ids, lengths in [
            ([0, 1, 2, 3, 4, 5, 6, 0], [7, 30, 1, 1, 96, 500, 460, 5]),
            ([0], [1100]),
            ([1, 0, 2, 3], [1000, 30, 24, 46]),
        ]
    ]
)


def arguments_of(case, dtype: Any) -> tuple:
    """A case as float32 parameters, complex64 state, tokens and their cotangent in `dtype`."""
    params = CemaParams(*(jnp.asarray(value, jnp.float32) for value in case.params))
    state = None if case.initial_state is None else jnp.asarray(case.initial_state, jnp.complex64)
    ids = None if case.segment_ids is None else jnp.asarray(case.segment_ids, jnp.int32)
    cotangents = (jnp.asarray(case.cot_y, dtype), jnp.asarray(case.cot_state, jnp.complex64))
    return jnp.asarray(case.x, dtype), params, state, ids, cotangents


@cache
def compiled_pass(interpret: Any) -> Any:
    """Forward and backward pass, compiled once for calls of one shape."""

    @jax.jit
    def run(x, params, state, segment_ids, cotangents):
        out, pull_back = jax.vjp(
            lambda *a: cema_pallas_tpu(*a, segment_ids, block_size=1024, interpret=interpret),
            x,
            params,
            state,
        )
        return out, pull_back(type(out)(*cotangents))

    return run


def run_kernels(case, dtype: Any, interpret: Any = True) -> dict[str, np.ndarray]:
    """Outputs and gradients by name, as the fixture `outputs_and_gradients` gives them."""
    out, (dx, dparams, dstate) = compiled_pass(interpret)(*arguments_of(case, dtype))
    assert out.y.dtype == dx.dtype == dtype
    results = {
        "y": out.y.astype(jnp.float32),
        "final_state": out.final_state,
        "dx": dx.astype(jnp.float32),
    }
    results |= {f"d{name}": value for name, value in dparams._asdict().items()}
    if dstate is not None:
        results["dinitial_state"] = dstate
    return {name: np.asarray(value) for name, value in results.items()}


def round_to_bfloat16(a: np.ndarray) -> np.ndarray:
    return np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64)


@pytest.mark.slow
def test_equals_float64_recurrence_without_races(
    make_case, outputs_and_gradients, relative_error, capfd
):
    case = make_case(1, 1100, 128, 3, with_state=True, segment_ids=PACKED[:1])
    want = outputs_and_gradients(case, jnp.float64, implementation="reference")
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    got = run_kernels(case, jnp.float32, interpret)
    # The interpreter prints the races that it finds.
    assert "RACE" not in capfd.readouterr().out
    errors = {name: relative_error(got[name], want[name]) for name in want}
    assert max(errors.values()) <= 3e-6, errors


@pytest.mark.slow
def test_any_length_channels_and_order(make_case, outputs_and_gradients, relative_error):
    case = make_case(2, 205, 130, 20, with_state=True)
    want = outputs_and_gradients(case, jnp.float64, implementation="reference")
    got = run_kernels(case, jnp.float32)
    errors = {name: relative_error(got[name], want[name]) for name in want}
    assert max(errors.values()) <= 3e-6, errors


@pytest.mark.slow
def test_bfloat16_is_as_good_as_its_output(make_case, outputs_and_gradients, relative_error):
    case = make_case(3, 1100, 128, 4, with_state=True, segment_ids=PACKED)
    case = case._replace(x=round_to_bfloat16(case.x), cot_y=round_to_bfloat16(case.cot_y))
    want = outputs_and_gradients(case, jnp.float64, implementation="reference")
    got = run_kernels(case, jnp.bfloat16)
    errors = {name: relative_error(got[name], want[name]) for name in want}
    for name in ("y", "dx"):
        rounding = relative_error(round_to_bfloat16(want[name]), want[name])
        assert errors.pop(name) <= 1.15 * rounding, name
    # Two bfloat16 terms hold 2^-17 of a table or state.
    assert max(errors.values()) <= 1e-5, errors
    for name in ("y", "dx"):
        assert not got[name][PACKED == 0].any()
    np.testing.assert_array_equal(got["final_state"][1], case.initial_state[1].astype(np.complex64))


@pytest.mark.slow
@pytest.mark.parametrize("document", [5, 6])
def test_documents_are_isolated(document, make_case):
    case = make_case(3, 1100, 128, 4, with_state=True, segment_ids=PACKED)
    selected = (document == PACKED)[..., None]
    # The cotangent of other documents is zero, so parameter gradients must not change either. The
    # state's reaches the last document alone.
    reaches_state = (np.arange(3) == 0) & (document == PACKED[0].max())
    case = case._replace(
        cot_y=case.cot_y * selected, cot_state=case.cot_state * reaches_state[:, None, None]
    )
    noise = np.where(PACKED[..., None] == 0, np.nan, 1e30 * (1 + np.abs(case.x)))
    changed = case._replace(
        x=np.where(selected, case.x, noise), initial_state=case.initial_state * 1e30
    )
    want, got = (run_kernels(each, jnp.bfloat16) for each in (case, changed))
    for name, value in want.items():
        other = got[name]
        if name in ("y", "dx"):
            value, other = value[selected[..., 0]], other[selected[..., 0]]
            assert value.any()
        elif name == "final_state":
            value, other = value[reaches_state], other[reaches_state]
        np.testing.assert_array_equal(value, other, err_msg=name)
    assert not want["dx"][~selected[..., 0]].any()
    assert not want["dinitial_state"].any()


@pytest.mark.slow
def test_streaming_equals_one_call(make_case, relative_error):
    case = make_case(1, 1400, 128, 4, with_state=True)
    x, params, state, _, _ = arguments_of(case, jnp.float32)
    call = jax.jit(lambda x, h: cema_pallas_tpu(x, params, h, None, interpret=True))
    whole = cema(x, params, initial_state=state, implementation="xla")
    first = call(x[:, :700], state)
    rest = call(x[:, 700:], first.final_state)
    outputs = np.concatenate([first.y, rest.y], axis=1)
    assert relative_error(outputs, np.asarray(whole.y)) <= 1e-6
    assert relative_error(np.asarray(rest.final_state), np.asarray(whole.final_state)) <= 1e-6


def test_unusable_arguments_are_refused():
    params = CemaParams(
        jnp.zeros((3, 5)), jnp.zeros((3, 5)), jnp.zeros(3), jnp.zeros((3, 5, 2)), jnp.zeros(3)
    )
    with pytest.raises(ValueError, match="multiple of 1024"):
        cema_pallas_tpu(jnp.zeros((1, 8, 3)), params, None, None, block_size=1000, interpret=True)
    with jax.enable_x64(True), pytest.raises(ValueError, match="x is float64"):
        cema_pallas_tpu(jnp.zeros((1, 8, 3), jnp.float64), params, None, None, interpret=True)
    with pytest.raises(ValueError, match="TPU v99"):
        tile_for("TPU v99")


def test_tiles_of_both_kernels_fit_each_other():
    for kind, tile in TILES.items():
        forward, backward = tile.tokens
        assert backward % 1024 == 0, kind
        assert forward % backward == 0, kind
