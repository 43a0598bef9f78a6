"""The TPU compiler accepts TimestepNorm's kernels; no TPU is needed."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.timestep_norm import TimestepNormState, timestep_norm
from tests.topologies import compile_for, tpu_device

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1"}


def compile_gradient(chip, shape, groups, dtype, *, packed):
    """Compiles both passes of the default implementation, with an initial state."""
    rows, length, channels = shape
    array = jax.ShapeDtypeStruct
    x, vector = array(shape, dtype), array((channels,), jnp.float32)
    moments = (array((rows, groups), jnp.float32),) * 2
    initial_state = TimestepNormState(array((rows,), jnp.int32), *moments)
    ids = array((rows, length), jnp.int32) if packed else None

    def run(x, scale, bias, initial_state, ids, cotangent):
        def normalize(x, scale, bias, mean, var):
            result = timestep_norm(
                x, scale, bias, num_groups=groups, segment_ids=ids,
                initial_state=TimestepNormState(initial_state.count, mean, var),
            )  # fmt: skip
            return result.y, *result.final_state[1:]

        out, pull_back = jax.vjp(normalize, x, scale, bias, *initial_state[1:])
        return out, pull_back(cotangent)

    cotangent = (x, *moments)
    device = tpu_device(TOPOLOGIES[chip])
    return compile_for(device, run, x, vector, vector, initial_state, ids, cotangent)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "shape", "groups", "packed"),
    [
        ("v4", (1, 5000, 1024), 32, True),
        ("v5e", (1, 16_384, 4096), 64, True),
        ("v5p", (8, 2048, 1024), 32, False),
        ("v6e", (1, 5000, 4096), 64, False),
    ],
)
def test_compiles_where_it_is_the_default(chip, shape, groups, packed):
    compiled = compile_gradient(chip, shape, groups, jnp.bfloat16, packed=packed)
    kernels = [
        line for line in (compiled.as_text() or "").splitlines() if "tpu_custom_call" in line
    ]
    assert any("timestep_norm_forward" in line for line in kernels)
    assert any("timestep_norm_backward" in line for line in kernels)
    # Temporary memory holds statistics of groups, no array of x's size.
    rows, length, channels = shape
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < rows * length * channels * 2 / 2


@pytest.mark.slow
def test_float32_and_wide_padded_groups_compile():
    compiled = compile_gradient("v5e", (2, 700, 600), 2, jnp.float32, packed=True)
    assert "timestep_norm_backward" in compiled.as_text()
