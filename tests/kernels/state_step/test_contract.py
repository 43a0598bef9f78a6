"""Contract of a step of CEMA over all implementations, against the sequence op and float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cema import CemaParams, cema
from pallas_kernels.common.target import find_target
from pallas_kernels.state_step import cema_step_tables, pack_state, state_step, unpack_state
from pallas_kernels.state_step.api import IMPLEMENTATIONS

pytestmark = pytest.mark.usefixtures("runnable")


# The Hopper kernel takes channels in multiples of 128.
WIDE = [name for name in IMPLEMENTATIONS if name != "mosaic_gpu"]

step_tables = jax.jit(cema_step_tables)


def make_params(channels, order, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((channels, order),) * 2 + ((channels,), (channels, order, 2), (channels,))
    return CemaParams(*(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes))


def make_state(rows, channels, order, dtype=np.float64, seed=1):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, 2 * order, channels)).astype(dtype)


def step_in_numpy(x, params, state):
    """The recurrence from CEMA's equations, in complex128."""
    alpha, delta, theta, gamma, omega = (np.asarray(a, np.float64) for a in params)
    order = alpha.shape[1]
    p, damping, frequency = (1 / (1 + np.exp(-a)) for a in (alpha, delta, theta))
    angle = np.arange(1, order + 1) * frequency[:, None] * 2 * np.pi / order
    q = (1 - p * damping) * np.exp(1j * angle)
    h = np.moveaxis(state[:, :order] + 1j * state[:, order:], 1, 2)
    h = q * h + p * x[..., None]
    y = ((gamma[..., 0] + 1j * gamma[..., 1]) / np.sqrt(order) * h).real.sum(-1) + omega * x
    h = np.moveaxis(h, 2, 1)
    return y, np.concatenate([h.real, h.imag], axis=1)


def test_packed_state():
    rng = np.random.default_rng(0)
    state = rng.normal(size=(2, 5, 3)) + 1j * rng.normal(size=(2, 5, 3))
    with jax.enable_x64(True):
        packed = pack_state(jnp.asarray(state))
        assert packed.shape == (2, 6, 5)
        np.testing.assert_array_equal(packed[1, 2], state[1, :, 2].real)
        np.testing.assert_array_equal(packed[1, 3], state[1, :, 0].imag)
        np.testing.assert_array_equal(unpack_state(packed), state)


@pytest.mark.parametrize(
    ("rows", "state_rows", "channels", "order"), [(1, 1, 5, 1), (3, 5, 7, 3), (2, 2, 48, 16)]
)
@pytest.mark.parametrize("implementation", WIDE)
def test_float64_equals_the_equations(implementation, rows, state_rows, channels, order):
    rng = np.random.default_rng(2)
    x, state = rng.normal(size=(rows, channels)), make_state(state_rows, channels, order)
    state[rows:] = np.nan
    with jax.enable_x64(True):
        params = make_params(channels, order)
        step = jax.jit(partial(state_step, implementation=implementation))
        y, new = step(jnp.asarray(x), step_tables(params), jnp.asarray(state))
        exact_y, exact_state = step_in_numpy(x, params, state[:rows])
    assert y.dtype == new.dtype == jnp.float64
    np.testing.assert_allclose(y, exact_y, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(new[:rows], exact_state, rtol=1e-12, atol=1e-12)
    assert new.shape == state.shape
    assert np.isnan(new[rows:]).all()


@pytest.mark.parametrize(
    ("rows", "state_rows", "channels", "order"), [(1, 1, 128, 16), (3, 5, 384, 4), (2, 3, 256, 1)]
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float32_state(implementation, rows, state_rows, channels, order, dtype):
    if implementation == "mosaic_gpu" and dtype != jnp.bfloat16:
        pytest.skip("the kernel takes bfloat16")
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(rows, channels)), dtype)
    state = make_state(state_rows, channels, order, np.float32)
    state[rows:] = np.nan
    params = make_params(channels, order, np.float32)
    step = jax.jit(partial(state_step, implementation=implementation), donate_argnums=2)
    y, new = step(x, step_tables(params), jnp.asarray(state))
    assert (y.dtype, new.dtype) == (dtype, jnp.float32)
    exact_y, exact_state = step_in_numpy(np.asarray(x, np.float64), params, state[:rows])
    error = np.linalg.norm(np.asarray(y, np.float64) - exact_y) / np.linalg.norm(exact_y)
    assert error <= (2.5e-3 if dtype == jnp.bfloat16 else 1e-6)
    new = np.asarray(new)
    assert np.linalg.norm(new[:rows] - exact_state) <= 1e-6 * np.linalg.norm(exact_state)
    np.testing.assert_array_equal(new[rows:], state[rows:])


@pytest.mark.parametrize("rows", [5, 66])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_that_are_not_active_keep_their_state(implementation, rows):
    """Also where a block of the kernel has several rows, some of them active."""
    if implementation == "mosaic_gpu" and rows > 5 and not find_target().is_hopper:
        rows = 9
    channels, order = 128, 4
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.normal(size=(rows, channels)), jnp.bfloat16)
    state = make_state(rows + 2, channels, order, np.float32)
    active = rng.random(rows) < 0.5
    active[:2] = True, False
    # A row that is not active may hold anything.
    state[1] = np.nan
    params = make_params(channels, order, np.float32)
    step = jax.jit(partial(state_step, implementation=implementation), donate_argnums=2)
    y, new = step(x, step_tables(params), jnp.asarray(state), active)
    exact_y, exact_state = step_in_numpy(np.asarray(x, np.float64), params, state[:rows])
    new = np.asarray(new)
    np.testing.assert_allclose(new[:rows][active], exact_state[active], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(new[:rows][~active], state[:rows][~active])
    np.testing.assert_array_equal(new[rows:], state[rows:])
    # The y of other rows may be anything, signaling NaN included.
    error = np.asarray(y[np.flatnonzero(active)], np.float64) - exact_y[active]
    assert np.linalg.norm(error) <= 2.5e-3 * np.linalg.norm(exact_y[active])
    with pytest.raises(ValueError, match=r"active is bool\(3,\)"):
        state_step(x, cema_step_tables(params), jnp.asarray(state), active[:3])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_token_by_token_equals_the_sequence(implementation):
    """A scan of steps gives the outputs and the state of `cema`, which shares no code with it."""
    rows, length, channels, order = 2, 37, 128, 4
    params = make_params(channels, order, np.float32)
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(rows, length, channels)), jnp.bfloat16)
    initial = unpack_state(jnp.asarray(make_state(rows, channels, order, np.float32)))
    whole = jax.jit(partial(cema, implementation="reference"))
    expected = whole(x, params, initial_state=initial)

    @jax.jit
    def stream(x, params, state):
        tables = cema_step_tables(params)

        def step(state, x):
            y, state = state_step(x, tables, state, implementation=implementation)
            return state, y

        return jax.lax.scan(step, state, jnp.swapaxes(x, 0, 1))

    state, y = stream(x, params, pack_state(initial))
    y, expected_y = (np.asarray(a, np.float64) for a in (jnp.swapaxes(y, 0, 1), expected.y))
    # Both round to bfloat16: a result next to a rounding border may fall on either side.
    assert np.mean(y != expected_y) < 1e-3
    np.testing.assert_allclose(y, expected_y, rtol=2**-7)
    np.testing.assert_allclose(unpack_state(state), expected.final_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_are_independent(implementation):
    tables = step_tables(make_params(128, 4, np.float32))
    x = jnp.ones((3, 128), jnp.bfloat16)
    state = jnp.asarray(make_state(3, 128, 4, np.float32))
    step = jax.jit(partial(state_step, implementation=implementation))
    plain = step(x, tables, state)
    disturbed = step(x.at[1].set(jnp.nan), tables, state)
    for got, expected in zip(disturbed, plain, strict=True):
        np.testing.assert_array_equal(np.asarray(got)[[0, 2]], np.asarray(expected)[[0, 2]])
    assert np.isnan(np.asarray(disturbed.y)[1].astype(np.float32)).all()
