"""TimestepNorm and CEMA of one token: all implementations against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common.target import Target
from pallas_kernels.norm_state_step import StepNorm, api, norm_state_step
from pallas_kernels.state_step import CemaStepTables
from pallas_kernels.timestep_norm import TimestepNormState

EPS = 1e-3


pytestmark = pytest.mark.usefixtures("runnable")


def make(rows, state_rows, groups, size, order, seed=0):
    """x, scale, bias, moments, tables and state; the rows after the first ones are NaN."""
    rng = np.random.default_rng(seed)
    channels = groups * size

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    moments = [rng.integers(0, 9, state_rows).astype(np.int32), normal(state_rows, groups),
               np.abs(normal(state_rows, groups))]  # fmt: skip
    state = normal(state_rows, 2 * order, channels)
    state[rows:], moments[1][rows:] = np.nan, np.nan
    tables = [normal(order, channels) / 2 for _ in range(5)]
    x = jnp.asarray(normal(rows, channels) + 1, jnp.bfloat16)
    return x, normal(channels), normal(channels), moments, [*tables, normal(channels)], state


def in_numpy(x, scale, bias, moments, tables, state, size):
    """TimestepNorm by sums over all numbers so far, then CEMA's recurrence in complex numbers."""
    rows = len(x)
    count, mean, var = (np.asarray(a[:rows], np.float64) for a in moments)
    groups = x.reshape(rows, -1, size)
    before, after = (count * size)[:, None], ((count + 1) * size)[:, None]
    total = before * mean + groups.sum(-1)
    squares = before * (var + mean**2) + (groups**2).sum(-1)
    new_mean = total / after
    new_var = squares / after - new_mean**2
    u = (groups - new_mean[..., None]) / np.sqrt(new_var[..., None] + EPS)
    u = u.reshape(x.shape) * scale + bias
    rounded = np.asarray(jnp.asarray(u, jnp.bfloat16), np.float64)
    q_re, q_im, p, g_re, g_im, omega = (np.asarray(a, np.float64) for a in tables)
    order = len(p)
    h = state[:rows, :order] + 1j * state[:rows, order:]
    h = (q_re + 1j * q_im) * h + p * rounded[:, None]
    y = ((g_re + 1j * g_im) * h).real.sum(1) + omega * rounded
    return u, y, new_mean, new_var, np.concatenate([h.real, h.imag], axis=1)


@pytest.mark.parametrize(
    ("rows", "state_rows", "groups", "size", "order"),
    [(1, 1, 4, 32, 3), (3, 5, 8, 64, 2), (66, 66, 4, 32, 2)],
)
@pytest.mark.parametrize("selects", [False, True])
@pytest.mark.parametrize("implementation", api.IMPLEMENTATIONS)
def test_equals_the_definition(implementation, rows, state_rows, groups, size, order, selects):
    x, scale, bias, moments, tables, state = make(rows, state_rows, groups, size, order)
    active = np.ones(rows, bool)
    if selects:
        active = np.random.default_rng(1).random(rows) < 0.6
        # A row that is not active may hold anything.
        state[:rows][~active] = np.nan
    out = jax.jit(
        lambda x, moments, tables, state, active: norm_state_step(
            x,
            StepNorm(jnp.asarray(scale), jnp.asarray(bias), groups, EPS),
            moments,
            tables,
            state,
            active if selects else None,
            implementation=implementation,
        )
    )(
        x,
        TimestepNormState(*map(jnp.asarray, moments)),
        CemaStepTables(*map(jnp.asarray, tables)),
        jnp.asarray(state),
        jnp.asarray(active),
    )
    u, y, mean, var, h = in_numpy(
        np.asarray(x, np.float64), scale, bias, moments, tables, state, size
    )
    where = np.flatnonzero(active)
    # u next to a rounding border may fall on the other side, and y follows it.
    for got, expected in ((out.u, u), (out.y, y)):
        error = np.asarray(got[where], np.float64) - expected[where]
        assert np.linalg.norm(error) <= 4e-3 * np.linalg.norm(expected[where])
    count, got_mean, got_var = map(np.asarray, out.norm)
    np.testing.assert_array_equal(count[:rows], moments[0][:rows] + active)
    np.testing.assert_allclose(got_mean[where], mean[where], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got_var[where], var[where], rtol=1e-5, atol=1e-6)
    new = np.asarray(out.state)
    error = np.linalg.norm(new[where] - h[where])
    assert error <= 3e-3 * np.linalg.norm(h[where])
    for got, old in ((new, state), (got_mean, moments[1]), (got_var, moments[2])):
        np.testing.assert_array_equal(got[:rows][~active], old[:rows][~active])
        np.testing.assert_array_equal(got[rows:], old[rows:])


def test_errors_name_what_is_wrong():
    x, scale, bias, moments, tables, state = make(2, 2, 4, 32, 2)
    norm = StepNorm(jnp.asarray(scale), jnp.asarray(bias), 4, EPS)
    moments, tables = TimestepNormState(*moments), CemaStepTables(*map(jnp.asarray, tables))
    with pytest.raises(ValueError, match=r"needs \(B, D\) with D in 3 groups"):
        norm_state_step(x, norm._replace(num_groups=3), moments, tables, state)
    with pytest.raises(ValueError, match=r"norm_state.mean has shape \(2, 4\); needs \(S, 8\)"):
        norm_state_step(x, norm._replace(num_groups=8), moments, tables, state)
    with pytest.raises(ValueError, match="norm_state has 2 rows, state 3"):
        norm_state_step(x, norm, moments, tables, np.zeros((3, 4, 128), np.float32))
    with pytest.raises(ValueError, match="norm_state_step has no implementation 'cuda'"):
        norm_state_step(x, norm, moments, tables, state, implementation="cuda")
    with pytest.raises(ValueError, match="groups of 32 or 64 channels"):
        norm_state_step(
            x,
            norm._replace(num_groups=8),
            TimestepNormState(np.zeros(2, np.int32), np.zeros((2, 8)), np.zeros((2, 8))),
            tables,
            state,
            implementation="mosaic_gpu",
        )


@pytest.mark.parametrize(
    ("target", "groups", "dtype", "has_kernel"),
    [
        (Target("gpu", "NVIDIA H200"), 32, jnp.bfloat16, True),
        (Target("gpu", "NVIDIA H200"), 16, jnp.bfloat16, True),
        (Target("gpu", "NVIDIA H200"), 64, jnp.bfloat16, False),
        (Target("gpu", "NVIDIA H200"), 32, jnp.float32, False),
        (Target("gpu", "NVIDIA A100-SXM4-80GB"), 32, jnp.bfloat16, False),
        (Target("tpu", "TPU v5p"), 32, jnp.bfloat16, False),
    ],
)
def test_choice(target, groups, dtype, has_kernel, monkeypatch):
    monkeypatch.setattr(api, "find_target", lambda: target)
    table = jax.ShapeDtypeStruct((16, 1024), jnp.float32)
    tables = CemaStepTables(*[table] * 5, jax.ShapeDtypeStruct((1024,), jnp.float32))
    x = jax.ShapeDtypeStruct((2, 1024), dtype)
    assert api._has_kernel(x, StepNorm(None, None, groups, EPS), tables) == has_kernel
