"""The TPU kernel in its interpreter, with 8-bit integers too; compiled ahead of time for TPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.chunk_decode.block_sizes import choose_tpu_block
from tests.kernels.chunk_decode.definition import attend, make_inputs, poison
from tests.kernels.chunk_decode.definition import run as run_plain
from tests.kernels.chunk_decode.test_in_place import check_in_place, compile_decoding
from tests.kernels.chunk_decode.test_int8 import exact_output, int8_shapes, make_case, run
from tests.topologies import tpu_device

TOPOLOGIES = {"v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1"}
# Slots that blocks of 512 and writes of 32 divide, or not; one block; tokens at borders of blocks.
CASES = [
    (1024, (1023, 512, 511, 33)),
    (600, (599, 512, 0, 640)),
    (70, (69, 70, 31, 32)),
]


@pytest.mark.usefixtures("runnable")
@pytest.mark.parametrize(("slots", "positions"), CASES)
def test_float32_equals_the_definition(slots, positions):
    inputs = make_inputs(4, 2, slots, 8, 12, cache_rows=5, seed=slots)
    poison(*inputs[3:], positions)
    got = run_plain(inputs, np.array(positions), "pallas_tpu", jnp.float32, inputs[2] / 2)
    exact = attend(*inputs, positions, inputs[2] / 2)
    for value, expected in zip(got, exact, strict=True):
        np.testing.assert_allclose(value, expected, rtol=3e-6, atol=3e-6)


@pytest.mark.usefixtures("runnable")
@pytest.mark.parametrize(("slots", "positions"), CASES)
def test_integers_equal_the_definition(slots, positions):
    positions = np.array(positions)
    inputs, cache = make_case(4, 2, slots, 8, 12, cache_rows=5, seed=slots)
    out = run(inputs, cache, positions, "pallas_tpu", jnp.float32, inputs[2] / 2)
    exact = exact_output(inputs, cache, positions, np.float32, inputs[2] / 2)
    np.testing.assert_allclose(out, exact, rtol=1e-5, atol=1e-5)


def test_blocks_have_about_a_megabyte():
    def slots_of_a_block(num_slots, dk, dv, dtype):
        shapes = (jax.ShapeDtypeStruct((1, 1, num_slots, width), dtype) for width in (dk, dv))
        return choose_tpu_block(*shapes)

    assert slots_of_a_block(2048, 256, 2048, jnp.bfloat16) == 256
    assert slots_of_a_block(2048, 256, 2048, jnp.int8) == 512
    assert slots_of_a_block(100, 256, 2048, jnp.int8) == 100
    assert slots_of_a_block(2048, 256, 2**14, jnp.bfloat16) is None


@pytest.mark.parametrize(
    ("chip", "kv", "rows", "cache_rows"),
    [
        ("v5e", "model", 8, 9),
        ("v5e", "int8", 8, 8),
        # Fewer keys would be moved into a v6e's VMEM for the whole loop.
        *(
            pytest.param(chip, kv, 256, 256, marks=pytest.mark.slow)
            for chip in ("v5p", "v6e")
            for kv in ("model", "int8")
        ),
    ],
)
def test_compiles_and_updates_the_cache_in_place(chip, kv, rows, cache_rows):
    """Through the default choice; the cache of more rows than decode too."""
    compiled, caches = compile_decoding(
        tpu_device(TOPOLOGIES[chip]), jnp.bfloat16, None, rows=rows, cache_rows=cache_rows,
        layers=2, slots=int8_shapes if kv == "int8" else None,
    )  # fmt: skip
    kernels = [
        line for line in (compiled.as_text() or "").splitlines() if "tpu_custom_call" in line
    ]
    assert any("chunk_decode" in line for line in kernels)
    check_in_place(compiled, caches)
