"""TimestepNorm and CEMA of several tokens: NumPy in float64, and the kernel's own single tokens."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common.target import Target
from pallas_kernels.norm_state_step import (
    StepNorm,
    TargetRows,
    api,
    norm_state_step,
    norm_state_steps,
)
from pallas_kernels.state_step import CemaStepTables
from pallas_kernels.timestep_norm import TimestepNormState
from tests.kernels.norm_state_step.test_contract import EPS, in_numpy, make

pytestmark = pytest.mark.usefixtures("runnable")

T, GROUPS = 5, 4
COUNTS = np.array([0, 3, T, 1], np.int32)
B, S = len(COUNTS), len(COUNTS) + 2


@functools.cache
def arrays(size: int):
    """As `make`, with T tokens of every row."""
    rng = np.random.default_rng(3)
    x, scale, bias, moments, tables, state = make(B, S, GROUPS, size, 2)
    x = jnp.asarray(rng.normal(size=(B, T, x.shape[1])) + 1, jnp.bfloat16)
    return x, scale, bias, moments, tables, state


@functools.cache
def expected(size: int):
    """u and y of all tokens, and means, variances and states after 0 to T of them, in float64."""
    x, scale, bias, moments, tables, state = arrays(size)
    x = np.asarray(x, np.float64)
    count, *states = (np.asarray(each[:B], np.float64) for each in (*moments, state))
    outputs, after = [], [states]
    for t in range(T):
        mean, var, state = after[-1]
        u, y, *states = in_numpy(x[:, t], scale, bias, (count + t, mean, var), tables, state, size)
        outputs.append((u, y))
        after.append(states)
    u, y = (np.stack(each, axis=1) for each in zip(*outputs, strict=True))
    return u, y, after


def call(implementation: str | None, size: int, counts: Any, target: TargetRows | None = None):
    x, scale, bias, moments, tables, state = arrays(size)
    norm = StepNorm(jnp.asarray(scale), jnp.asarray(bias), GROUPS, EPS)

    @jax.jit
    def run(x, moments, tables, state, counts_array, target):
        return norm_state_steps(
            x,
            norm,
            moments,
            tables,
            state,
            counts if counts_array is None else counts_array,
            target=target,
            implementation=implementation,
        )

    return run(
        x,
        TimestepNormState(*map(jnp.asarray, moments)),
        CemaStepTables(*map(jnp.asarray, tables)),
        jnp.asarray(state),
        jnp.asarray(counts) if isinstance(counts, np.ndarray) else None,
        target,
    )


def assert_outputs(out, size: int):
    for got, wanted in zip((out.u, out.y), expected(size), strict=False):
        error = np.asarray(got, np.float64) - wanted
        # u next to a rounding border may fall on the other side, and y follows it.
        assert np.linalg.norm(error) <= 4e-3 * np.linalg.norm(wanted)


def assert_states(norm, state, first_row: int, counts: np.ndarray, size: int):
    after = expected(size)[2]
    np.testing.assert_array_equal(
        norm.count[first_row : first_row + B], arrays(size)[3][0][:B] + counts
    )
    for row, count in enumerate(counts):
        mean, var, h = (each[row] for each in after[count])
        got = first_row + row
        np.testing.assert_allclose(norm.mean[got], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(norm.var[got], var, rtol=1e-5, atol=1e-6)
        assert np.linalg.norm(np.asarray(state[got]) - h) <= 3e-3 * np.linalg.norm(h)


@pytest.mark.parametrize(
    ("implementation", "size"),
    [
        ("reference", 32),
        ("xla", 64),
        ("mosaic_gpu", 32),
        pytest.param("mosaic_gpu", 64, marks=pytest.mark.slow),
    ],
)
def test_states_after_the_counted_tokens(implementation: str, size: int):
    """Rows count 0, 1, some and all tokens; other rows hold NaN and stay."""
    out = call(implementation, size, COUNTS)
    assert_outputs(out, size)
    assert_states(out.norm, out.state, 0, COUNTS, size)
    _, _, _, (count, mean, var), _, state = arrays(size)
    for got, old in zip((*out.norm, out.state), (count, mean, var, state), strict=True):
        stays = [0, *range(B, S)] if got is not out.norm.count else range(B, S)
        np.testing.assert_array_equal(np.asarray(got)[list(stays)], old[list(stays)])


@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
def test_states_go_into_other_rows(implementation: str):
    """Rows with 0 tokens are copied; the target's rows before and behind stay NaN."""
    size, first_row = 32, 2

    def poison(old):
        old = jnp.asarray(old[:1])
        poison = jnp.nan if jnp.issubdtype(old.dtype, jnp.floating) else -1
        return jnp.full((first_row + B + 1, *old.shape[1:]), poison, old.dtype)

    _, _, _, moments, _, state = arrays(size)
    target = TargetRows(
        TimestepNormState(*map(poison, moments)), poison(state), jnp.int32(first_row)
    )
    out = call(implementation, size, COUNTS, target)
    assert_outputs(out, size)
    assert_states(out.norm, out.state, first_row, COUNTS, size)
    np.testing.assert_array_equal(out.state[first_row], state[0])
    others = np.array([0, 1, first_row + B])
    assert np.isnan(out.state[others]).all()
    assert np.isnan(out.norm.mean[others]).all()
    assert np.isnan(out.norm.var[others]).all()
    np.testing.assert_array_equal(out.norm.count[others], -1)


@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
def test_counts_of_all_tokens_and_of_none(implementation: str):
    size = 32
    out = call(implementation, size, None)
    assert_outputs(out, size)
    assert_states(out.norm, out.state, 0, np.full(B, T), size)
    out = call(implementation, size, 0)
    assert_outputs(out, size)
    _, _, _, moments, _, state = arrays(size)
    for got, old in zip((*out.norm, out.state), (*moments, state), strict=True):
        np.testing.assert_array_equal(got, old)


def test_the_kernel_has_the_bits_of_single_tokens():
    size = 32
    x, scale, bias, moments, tables, state = arrays(size)
    norm = StepNorm(jnp.asarray(scale), jnp.asarray(bias), GROUPS, EPS)
    tables = CemaStepTables(*map(jnp.asarray, tables))

    @jax.jit
    def step(x, moments, state, active):
        return norm_state_step(x, norm, moments, tables, state, active, implementation="mosaic_gpu")

    states = (TimestepNormState(*map(jnp.asarray, moments)), jnp.asarray(state))
    out = call("mosaic_gpu", size, COUNTS)
    for t in range(T):
        is_counted = t < COUNTS
        u, y, *states = step(x[:, t], *states, is_counted)
        for got, wanted in ((out.u, u), (out.y, y)):
            np.testing.assert_array_equal(got[is_counted, t], wanted[is_counted])
    jax.tree.map(np.testing.assert_array_equal, (out.norm, out.state), tuple(states))


def test_errors_name_what_is_wrong():
    x, scale, bias, moments, tables, state = arrays(32)
    norm = StepNorm(jnp.asarray(scale), jnp.asarray(bias), GROUPS, EPS)
    operands: Any = (
        norm,
        TimestepNormState(*moments),
        CemaStepTables(*map(jnp.asarray, tables)),
        state,
    )
    with pytest.raises(ValueError, match=r"needs \(B, T, D\) with D in 4 groups"):
        norm_state_steps(x[:, 0], *operands)
    with pytest.raises(ValueError, match=r"x has shape \(4, 0, 128\)"):
        norm_state_steps(x[:, :0], *operands)
    with pytest.raises(ValueError, match=r"counts is the number 2; use an int32 array \(4,\)"):
        norm_state_steps(x, *operands, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"counts is int32\(3,\); needs int32\(4,\)"):
        norm_state_steps(x, *operands, jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match="norm_state_steps has no implementation 'cuda'"):
        norm_state_steps(x, *operands, implementation="cuda")
    target = TargetRows(TimestepNormState(*moments), np.zeros((3, 4, 128)), 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="norm_state has 6 rows, state 3"):
        norm_state_steps(x, *operands, jnp.asarray(COUNTS), target=target)
    many = jnp.zeros((B, 65, x.shape[2]), x.dtype)
    with pytest.raises(ValueError, match="takes up to 64 tokens of a row"):
        norm_state_steps(many, *operands, implementation="mosaic_gpu")


@pytest.mark.parametrize(("tokens", "has_kernel"), [(16, True), (64, True), (65, False)])
def test_choice(tokens: int, has_kernel: bool, monkeypatch):
    monkeypatch.setattr(api, "find_target", lambda: Target("gpu", "NVIDIA H200"))
    table = jax.ShapeDtypeStruct((16, 1024), jnp.float32)
    tables: Any = CemaStepTables(*[table] * 5, jax.ShapeDtypeStruct((1024,), jnp.float32))  # type: ignore[arg-type]
    x: Any = jax.ShapeDtypeStruct((2, tokens, 1024), jnp.bfloat16)
    assert api._has_kernel(x, StepNorm(None, None, 32, EPS), tables) == has_kernel
