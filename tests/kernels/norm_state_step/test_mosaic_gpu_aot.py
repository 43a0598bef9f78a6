"""The CUDA compiler accepts the step for an H200: no spills, states updated in place."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.norm_state_step import StepNorm, TargetRows
from pallas_kernels.norm_state_step.mosaic_gpu import op as mosaic_gpu
from pallas_kernels.state_step import CemaStepTables
from pallas_kernels.timestep_norm import TimestepNormState
from tests.kernels.in_place import copies_of
from tests.topologies import compile_for, h200_device, ptxas_usage

ORDER = 16
Shape = jax.ShapeDtypeStruct


def operands(rows, groups, size):
    channels = groups * size
    table = Shape((ORDER, channels), jnp.float32)
    moments = Shape((rows, groups), jnp.float32)
    return (
        Shape((rows, channels), jnp.bfloat16),
        Shape((channels,), jnp.float32),
        TimestepNormState(Shape((rows,), jnp.int32), moments, moments),
        CemaStepTables(*[table] * 5, Shape((channels,), jnp.float32)),
        Shape((rows, 2 * ORDER, channels), jnp.float32),
        Shape((rows,), jnp.bool_),
    )


def step(x, vector, moments, tables, state, active):
    norm = StepNorm(vector, vector, moments.mean.shape[1], 1e-5)
    return mosaic_gpu.norm_state_step(x, norm, moments, tables, state, active)


# mega200M, and groups of the paper's 7B.
@pytest.mark.parametrize(("rows", "groups", "size"), [(2, 32, 32), (256, 32, 32), (64, 64, 64)])
@pytest.mark.slow
def test_kernel_fits_into_registers(rows, groups, size):
    compiled = compile_for(h200_device(), step, *operands(rows, groups, size))
    (usage,) = ptxas_usage(compiled)
    print(f"{usage.name}: {usage.registers} registers for {rows} rows, groups of {size}")
    assert usage.name == "norm_state_step"
    assert usage.spill_bytes == 0


def feed_steps(x, vector, moments, tables, state, counts=0, target=None):
    norm = StepNorm(vector, vector, moments.mean.shape[1], 1e-5)
    return mosaic_gpu.norm_state_steps(x, norm, moments, tables, state, counts, target)


def operands_of_steps(rows, tokens, groups, size):
    x, *others, _ = operands(rows, groups, size)
    return Shape((rows, tokens, x.shape[1]), x.dtype), *others


@pytest.mark.parametrize("kind", ["counts", "no states", "target"])
@pytest.mark.parametrize(("tokens", "groups", "size"), [(5, 32, 32), (16, 64, 64)])
@pytest.mark.slow
def test_kernel_of_several_tokens_fits_into_registers(kind, tokens, groups, size):
    """Speculation in mega200M, and the last tokens of a known prompt of the paper's 7B."""
    given = operands_of_steps(2, tokens, groups, size)
    counts = Shape((2,), jnp.int32)
    _, _, moments, _, state = given
    target = TargetRows(moments, state, Shape((), jnp.int32))
    more = {"counts": (counts,), "no states": (), "target": (counts, target)}[kind]
    (usage,) = ptxas_usage(compile_for(h200_device(), feed_steps, *given, *more))
    print(f"{usage.name}: {usage.registers} registers, {kind}, groups of {size}")
    assert usage.name == "norm_state_steps"
    assert usage.spill_bytes == 0


@pytest.mark.slow
def test_the_target_is_updated_in_place_and_the_states_are_not_copied():
    given = operands_of_steps(1, 16, 32, 32)
    _, _, moments, _, state = operands_of_steps(4, 16, 32, 32)

    def feed(*arguments):
        *given, counts, norm, state, row = arguments
        return feed_steps(*given, counts, TargetRows(norm, state, row))[2:]

    row = Shape((), jnp.int32)
    compiled = compile_for(
        h200_device(), feed, *given, Shape((1,), jnp.int32), moments, state, row,
        donate_argnums=(6, 7),
    )  # fmt: skip
    assert not copies_of(compiled, {each.shape for each in (given[4], state, moments.mean)})


@pytest.mark.slow
def test_states_in_the_carry_of_a_scan_are_updated_in_place():
    x, vector, moments, tables, state, active = operands(8, 32, 32)

    def decode(x, vector, moments, tables, states, active):
        def one(carry, _):
            x, moments, states = carry
            for i, state in enumerate(states):
                out = step(x, vector, moments[i], tables, state, active)
                x, moments[i], states[i] = out.y, out.norm, out.state
            return (x, moments, states), ()

        return jax.lax.scan(one, (x, moments, states), length=4)[0]

    compiled = compile_for(
        h200_device(),
        decode,
        x,
        vector,
        [moments] * 3,
        tables,
        [state] * 3,
        active,
        donate_argnums=(2, 4),
    )
    assert not copies_of(compiled, {state.shape, moments.mean.shape})
