"""Properties of every implementation of CEMA."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cema import CemaParams, cema

EXACT = ["reference", "xla"]
# The TPU's interpreter takes half a minute for some of these: on a CPU, test_pallas_tpu.py tests
# these properties with functions compiled once.
KERNELS = ["mosaic_gpu", pytest.param("pallas_tpu", marks=pytest.mark.device_only), "triton"]
IMPLEMENTATIONS = [*EXACT, *KERNELS]
# For properties whose test compiles a kernel of its own.
SLOW_KERNELS = [*EXACT, pytest.param("mosaic_gpu", marks=pytest.mark.slow), *KERNELS[1:]]
# Largest relative error of outputs and of gradients, float32.
TOLERANCES = {"xla": (5e-7, 3e-6), "mosaic_gpu": (3e-6, 1e-5), "pallas_tpu": (5e-7, 3e-6)}
TOLERANCES["triton"] = TOLERANCES["mosaic_gpu"]

# Tests of packed rows have the shape (3, 65, 3), N = 2 and this option: they share a compilation.
SHARED = {"llvm_level": 3}


def segments_of(*rows: list[tuple[int, int]]) -> np.ndarray:
    """Rows of segment ids from (id, length) runs."""
    return np.stack([np.concatenate([np.full(n, i) for i, n in row]) for row in rows])


PACKED_500 = segments_of(
    [(1, 3), (2, 1), (3, 1), (4, 40), (5, 200), (6, 255)],
    [(0, 37), (1, 160), (0, 5), (2, 32), (3, 129), (0, 137)],
    [(1, 500)],
    [(0, 500)],
)
PACKED_65 = segments_of([(1, 32), (2, 1), (3, 32)], [(1, 64), (0, 1)], [(0, 64), (1, 1)])


PACKED_3 = segments_of([(1, 1), (2, 2)], [(0, 1), (1, 1), (0, 1)], [(0, 3)])

# The interpreter of one backend takes ten times as long as `xla`: one case of it is quick enough.
# Two cases of `xla` differ from their neighbours in the order or the initial state alone.
SHAPES = [
    (2, 1, 5, 16, True, None),
    (2, 63, 5, 1, True, None),
    (1, 64, 11, 8, False, None),
    (3, 65, 3, 2, True, PACKED_65),
    (3, 65, 3, 32, True, PACKED_65),
    (4, 500, 5, 16, True, PACKED_500),
    (4, 500, 5, 16, False, PACKED_500),
    (1, 1000, 9, 16, True, None),
    (1, 4096, 136, 16, True, None),
    (3, 3, 5, 16, True, PACKED_3),
]
CASES = [
    pytest.param(name, *shape, marks=marks)
    for i, shape in enumerate(SHAPES)
    for name, marks in (
        ("xla", [pytest.mark.slow] if i in (4, 6) else []),
        ("mosaic_gpu", [] if i == 3 else [pytest.mark.slow]),
        ("pallas_tpu", [pytest.mark.device_only]),
        ("triton", [pytest.mark.slow] if i in (2, 4) else []),
    )
]


@pytest.mark.parametrize(
    ("implementation", "rows", "length", "channels", "order", "with_state", "segment_ids"), CASES
)
def test_equals_float64_recurrence(
    implementation,
    rows,
    length,
    channels,
    order,
    with_state,
    segment_ids,
    make_case,
    outputs_and_gradients,
    relative_error,
):
    if implementation == "xla" and length > 1000:
        pytest.skip("test_precision.py tests longer rows")
    case = make_case(rows, length, channels, order, with_state=with_state, segment_ids=segment_ids)
    want = outputs_and_gradients(case, jnp.float64, implementation="reference")
    got = outputs_and_gradients(case, jnp.float32, **SHARED, implementation=implementation)
    errors = {name: relative_error(got[name], want[name]) for name in want}
    assert all(np.isfinite(value).all() for value in got.values())
    output_tolerance, gradient_tolerance = TOLERANCES[implementation]
    assert max(errors.values()) <= gradient_tolerance, errors
    assert max(errors["y"], errors["final_state"]) <= output_tolerance, errors


@pytest.mark.slow
def test_xla_in_float64_equals_recurrence_to_rounding(
    make_case, outputs_and_gradients, relative_error
):
    case = make_case(4, 500, 3, 4, with_state=True, segment_ids=PACKED_500)
    want = outputs_and_gradients(case, jnp.float64, implementation="reference")
    got = outputs_and_gradients(case, jnp.float64, implementation="xla", block_size=24)
    assert got["y"].dtype == np.float64
    assert got["final_state"].dtype == np.complex128
    errors = {name: relative_error(got[name], want[name]) for name in want}
    assert max(errors.values()) <= 1e-12, errors


@pytest.mark.parametrize("implementation", EXACT)
def test_recurrence_written_out_in_numpy(
    implementation, make_case, outputs_and_gradients, relative_error
):
    case = make_case(2, 12, 3, 5, with_state=True)
    alpha, delta, theta, gamma, omega = case.params

    def sigmoid(v):
        return 1 / (1 + np.exp(-v))

    p = sigmoid(alpha)
    angle = np.arange(1, 6) * sigmoid(theta)[:, None] * 2 * np.pi / 5
    q = (1 - p * sigmoid(delta)) * np.exp(1j * angle)
    h, y = case.initial_state, np.empty_like(case.x)
    for t in range(12):
        h = q * h + p * case.x[:, t, :, None]
        weighted = (gamma[..., 0] + 1j * gamma[..., 1]) / np.sqrt(5) * h
        y[:, t] = weighted.real.sum(-1) + omega * case.x[:, t]
    got = outputs_and_gradients(case, jnp.float64, implementation=implementation)
    assert relative_error(got["y"], y) <= 1e-13
    assert relative_error(got["final_state"], h) <= 1e-13


@pytest.mark.parametrize("implementation", SLOW_KERNELS)
def test_streaming_equals_one_call(implementation, make_case, relative_error):
    case = make_case(2, 140, 3, 4, with_state=True)
    params = CemaParams(*(jnp.asarray(value, jnp.float32) for value in case.params))
    x = jnp.asarray(case.x, jnp.float32)
    state = jnp.asarray(case.initial_state, jnp.complex64)
    call = jax.jit(lambda x, h: cema(x, params, initial_state=h, implementation=implementation))
    whole = call(x, state)
    outputs, start = [], 0
    # Few different lengths: each is a compilation.
    for length in (1, 69, 1, 69):
        y, state = call(x[:, start : start + length], state)
        outputs.append(y)
        start += length
    assert start == 140
    assert relative_error(np.concatenate(outputs, axis=1), np.asarray(whole.y)) <= 1e-6
    assert relative_error(np.asarray(state), np.asarray(whole.final_state)) <= 1e-6


# Not "mosaic_gpu": half a minute in the interpreter, and its packed rows equal float64 above.
@pytest.mark.parametrize(
    "implementation", [name for name in IMPLEMENTATIONS if name != "mosaic_gpu"]
)
def test_packed_documents_equal_documents_alone(
    implementation, make_case, outputs_and_gradients, relative_error
):
    segment_ids = segments_of([(1, 33), (2, 2), (3, 37), (0, 8)])
    packed = make_case(1, 80, 3, 4, segment_ids=segment_ids)
    whole = outputs_and_gradients(packed, jnp.float32, implementation=implementation)
    totals: dict[str, np.ndarray] = {}
    for document in (1, 2, 3):
        where = segment_ids[0] == document
        alone = packed._replace(
            x=packed.x[:, where],
            segment_ids=None,
            cot_y=packed.cot_y[:, where],
            cot_state=packed.cot_state * (document == 3),
        )
        got = outputs_and_gradients(alone, jnp.float32, implementation=implementation)
        assert relative_error(whole["y"][:, where], got["y"]) <= 1e-6
        assert relative_error(whole["dx"][:, where], got["dx"]) <= 1e-6
        for name in ("dalpha", "ddelta", "dtheta", "dgamma", "domega"):
            totals[name] = totals.get(name, 0) + got[name]
        if document == 3:
            assert relative_error(whole["final_state"], got["final_state"]) <= 1e-6
    for name, total in totals.items():
        assert relative_error(whole[name], total) <= 3e-6, name
    assert not whole["y"][:, segment_ids[0] == 0].any()
    assert not whole["dx"][:, segment_ids[0] == 0].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_documents_are_isolated(implementation, make_case, outputs_and_gradients):
    segment_ids = segments_of(
        [(1, 25), (2, 5), (3, 30), (0, 5)], [(1, 33), (3, 32)], [(0, 10), (2, 15), (3, 40)]
    )
    case = make_case(3, 65, 3, 2, with_state=True, segment_ids=segment_ids)
    selected = segment_ids == 3
    # The cotangent of other documents is zero, so parameter gradients must not change either.
    case = case._replace(cot_y=case.cot_y * selected[..., None])
    changed = case._replace(
        x=np.where(selected[..., None], case.x, 1e30 * (1 + np.abs(case.x))),
        initial_state=case.initial_state * 1e30,
    )
    want, got = (
        outputs_and_gradients(each, jnp.float32, **SHARED, implementation=implementation)
        for each in (case, changed)
    )
    for name, value in want.items():
        other = got[name]
        if name in ("y", "dx"):
            value, other = value[selected], other[selected]
        np.testing.assert_array_equal(value, other, err_msg=name)
    assert not want["dx"][~selected].any()
    assert not want["dinitial_state"].any()


@pytest.mark.parametrize("implementation", SLOW_KERNELS)
def test_padding_leaves_the_state_unchanged(implementation, make_case, relative_error):
    case = make_case(2, 50, 3, 4, with_state=True)
    params = CemaParams(*(jnp.asarray(value, jnp.float32) for value in case.params))
    state = jnp.asarray(case.initial_state, jnp.complex64)
    x = jnp.asarray(case.x, jnp.float32).at[1].set(jnp.nan).at[0, :7].set(jnp.nan)
    segment_ids = jnp.asarray(segments_of([(0, 7), (1, 43)], [(0, 50)]), jnp.int32)
    call = jax.jit(partial(cema, implementation=implementation))
    out = call(x, params, initial_state=state, segment_ids=segment_ids)
    alone = call(x[:1, 7:], params, initial_state=state[:1])
    assert relative_error(np.asarray(out.y[:1, 7:]), np.asarray(alone.y)) <= 1e-6
    assert relative_error(np.asarray(out.final_state[:1]), np.asarray(alone.final_state)) <= 1e-6
    np.testing.assert_array_equal(out.final_state[1], state[1])
    assert not np.asarray(out.y[1]).any()
    assert not np.asarray(out.y[0, :7]).any()


@pytest.mark.parametrize("implementation", SLOW_KERNELS)
def test_padding_values_have_no_influence(implementation, make_case, outputs_and_gradients):
    segment_ids = segments_of([(0, 7), (1, 40), (0, 18)], [(0, 65)], [(1, 30), (0, 35)])
    case = make_case(3, 65, 3, 2, with_state=True, segment_ids=segment_ids)
    padding = segment_ids[..., None] == 0
    zeros, nans = (
        case._replace(x=np.where(padding, fill, case.x), cot_y=np.where(padding, fill, case.cot_y))
        for fill in (0, np.nan)
    )
    want, got = (
        outputs_and_gradients(each, jnp.float32, **SHARED, implementation=implementation)
        for each in (zeros, nans)
    )
    for name, value in want.items():
        np.testing.assert_array_equal(value, got[name], err_msg=name)
    np.testing.assert_array_equal(want["dinitial_state"][1], case.cot_state[1].astype(np.complex64))


@pytest.mark.parametrize("implementation", SLOW_KERNELS)
def test_bfloat16_input_is_computed_in_float32(implementation, make_case, relative_error):
    case = make_case(2, 100, 3, 4)
    params = CemaParams(*(jnp.asarray(value, jnp.float32) for value in case.params))
    x = jnp.asarray(case.x, jnp.bfloat16)
    call = jax.jit(partial(cema, implementation=implementation))
    low = call(x, params)
    full = call(x.astype(jnp.float32), params)
    assert low.y.dtype == jnp.bfloat16
    assert low.final_state.dtype == jnp.complex64
    # TPU kernels have tables in two bfloat16 terms.
    allowed = 5e-6 if implementation == "pallas_tpu" else 1e-6
    assert relative_error(np.asarray(low.final_state), np.asarray(full.final_state)) <= allowed
    rounded = np.asarray(full.y.astype(jnp.bfloat16), np.float32)
    assert relative_error(np.asarray(low.y, np.float32), rounded) <= 1e-4


def test_gradient_of_bfloat16_input(make_case, outputs_and_gradients, relative_error):
    def to_bfloat16(a: np.ndarray) -> np.ndarray:
        return np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64)

    case = make_case(2, 100, 3, 4)
    case = case._replace(
        x=to_bfloat16(case.x), cot_y=to_bfloat16(case.cot_y), cot_state=0 * case.cot_state
    )
    params = CemaParams(*(jnp.asarray(value, jnp.float32) for value in case.params))
    want = outputs_and_gradients(case, jnp.float64, implementation="reference")

    @jax.jit
    def gradients(x, params, cot_y):
        return jax.vjp(lambda *a: cema(*a, implementation="xla").y, x, params)[1](cot_y)

    dx, dparams = gradients(
        jnp.asarray(case.x, jnp.bfloat16), params, jnp.asarray(case.cot_y, jnp.bfloat16)
    )
    assert dx.dtype == jnp.bfloat16
    assert relative_error(np.asarray(dx, np.float64), want["dx"]) <= 2.5e-3
    for name, value in dparams._asdict().items():
        assert relative_error(np.asarray(value), want[f"d{name}"]) <= 3e-6, name


def test_large_logits_stay_finite():
    params = CemaParams(
        alpha=jnp.full((2, 3), 40.0),
        delta=jnp.asarray([[40.0] * 3, [-40.0] * 3]),
        theta=jnp.asarray([80.0, -80.0]),
        gamma=jnp.ones((2, 3, 2)),
        omega=jnp.zeros(2),
    )

    @jax.jit
    def run(x):
        y, pull_back = jax.vjp(lambda p: cema(x, p, implementation="xla").y, params)
        return y, pull_back(jnp.ones_like(y))

    for value in jax.tree.leaves(run(jnp.ones((1, 70, 2)))):
        assert jnp.isfinite(value).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "cuda"}, "'reference', 'xla', 'mosaic_gpu', 'pallas_tpu', 'triton'"),
        ({"implementation": "reference", "block_size": 8}, "leave block_size out"),
        ({"block_size": 0}, "positive"),
        ({"initial_state": jnp.zeros((2, 3, 5))}, "complex"),
        ({"segment_ids": jnp.ones((2, 9), jnp.int32)}, r"segment_ids is int32\(2, 9\)"),
        ({"x": jnp.zeros((2, 8))}, "B, L, D"),
        ({"x": jnp.zeros((2, 8, 3), jnp.int32)}, "int32"),
        ({"x": jnp.zeros((2, 8, 4))}, "alpha has shape"),
        (
            {"initial_state": jnp.zeros((2, 3, 5), jnp.complex64), "sequence_axis": "chunk"},
            "initial_state=None",
        ),
    ],
)
def test_unusable_arguments_are_refused(change, message):
    params = CemaParams(
        jnp.zeros((3, 5)), jnp.zeros((3, 5)), jnp.zeros(3), jnp.zeros((3, 5, 2)), jnp.zeros(3)
    )
    arguments = {"x": jnp.zeros((2, 8, 3)), **change}
    with pytest.raises(ValueError, match=message):
        cema(arguments.pop("x"), params, **arguments)


def test_bfloat16_parameters_are_refused():
    params = CemaParams(
        *(jnp.zeros(shape, jnp.bfloat16) for shape in [(3, 5), (3, 5), (3,), (3, 5, 2), (3,)])
    )
    with pytest.raises(ValueError, match="stay float32"):
        cema(jnp.zeros((2, 8, 3)), params)
