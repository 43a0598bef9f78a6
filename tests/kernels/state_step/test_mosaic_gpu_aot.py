"""The CUDA compiler accepts the step for an H200: no spills, and the state is updated in place."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.state_step import CemaStepTables, state_step
from pallas_kernels.state_step.mosaic_gpu import op as mosaic_gpu
from tests.kernels.in_place import copies_of, temporary_share
from tests.topologies import compile_for, h200_device, ptxas_usage

CHANNELS, ORDER = 1024, 16
TABLE = jax.ShapeDtypeStruct((ORDER, CHANNELS), jnp.float32)
TABLES = CemaStepTables(*[TABLE] * 5, jax.ShapeDtypeStruct((CHANNELS,), jnp.float32))


def operands(rows, state_rows):
    state = jax.ShapeDtypeStruct((state_rows, 2 * ORDER, CHANNELS), jnp.float32)
    return jax.ShapeDtypeStruct((rows, CHANNELS), jnp.bfloat16), TABLES, state


@pytest.mark.parametrize("rows", [1, 64, 256])
def test_kernel_fits_into_registers(rows):
    compiled = compile_for(h200_device(), mosaic_gpu.state_step, *operands(rows, rows))
    (usage,) = ptxas_usage(compiled)
    print(f"{usage.name}: {usage.registers} registers for {rows} rows")
    assert usage.name == "state_step"
    assert usage.spill_bytes == 0


@pytest.mark.parametrize(("rows", "state_rows"), [(8, 8), (8, 9)])
def test_states_in_the_carry_of_a_scan_are_updated_in_place(rows, state_rows):
    def decode(x, tables, states):
        def step(states, _):
            ys = []
            for i, state in enumerate(states):
                y, states[i] = state_step(x, tables, state, implementation="mosaic_gpu")
                ys.append(y)
            return states, sum(ys)

        return jax.lax.scan(step, states, length=4)

    x, tables, state = operands(rows, state_rows)
    states = [state] * 4
    compiled = compile_for(h200_device(), decode, x, tables, states, donate_argnums=2)
    assert not copies_of(compiled, {state.shape})
    share = temporary_share(compiled, states)
    print(f"temporaries and outputs: {share:.2%} of the states")
    assert share <= 0.05
