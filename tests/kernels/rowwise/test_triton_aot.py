"""Triton compiles the row kernels for every generation of NVIDIA GPUs from Ampere on."""

import jax.numpy as jnp
import pytest

from pallas_kernels import rowwise
from pallas_kernels.common.devices import GPU_LIMITS
from pallas_kernels.common.target import interpreted
from pallas_kernels.common.triton import load_kernels
from pallas_kernels.rowwise.triton.block_sizes import choose_programs
from pallas_kernels.rowwise.triton.launch import MODULE
from tests.kernels.triton_compiler import CAPABILITIES, compile_kernel

FLAGS = ("CENTERED", "ADDED", "OFFSET", "SCALE", "BIAS", "GATE")
ROWS = ("x", "y", "dy", "dx", "added", "d_out", "out")


@pytest.fixture(scope="module")
def kernels():
    pytest.importorskip("triton", reason="needs the extra: pip install -e '.[triton]'")
    return load_kernels(MODULE)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("width", [1024, 4096])
@pytest.mark.parametrize("operation", ["norm", "gate"])
def test_kernels_fit_every_generation(kernels, operation, width, capability, tmp_path):
    for direction in ("forward", "backward"):
        programs = choose_programs(
            16_384, width, 108, norm=operation == "norm", backward=direction == "backward"
        )
        kernel = getattr(kernels, f"rowwise_{operation}_{direction}")
        types = dict.fromkeys(kernel.arg_names, "float32")
        types |= dict.fromkeys(ROWS, "bfloat16") | {"num_rows": "i32"}
        constants = {
            "WIDTH": width, "BLOCK": programs.block, "R": programs.rows_per_step,
            "NUM_PROGRAMS": programs.num_programs, "EPS": 1e-5,
            "PREFETCH": programs.prefetch, **dict.fromkeys(FLAGS, True),
        }  # fmt: skip
        constants = {name: constants[name] for name in kernel.arg_names if name in constants}
        usage = compile_kernel(
            kernel, capability, types, constants, tmp_path, num_warps=programs.num_warps
        )
        print(f"sm_{capability} {kernel.__name__} {width}: {usage} {programs}")
        assert usage.spilled == 0
        assert usage.registers * 32 * programs.num_warps <= GPU_LIMITS[capability].registers
        # Sums over a row, and vectors that change their layout before the loop.
        assert usage.shared_memory <= min(GPU_LIMITS[capability].shared_memory, 32 * 1024)


def test_what_kernels_cannot_take_is_refused_by_name():
    pytest.importorskip("triton", reason="needs the extra: pip install -e '.[triton]'")
    options = {"eps": 1e-5, "dtype": jnp.bfloat16, "implementation": "triton"}
    with interpreted():
        with pytest.raises(ValueError, match="up to 16384 numbers in registers, these have 32768"):
            rowwise.rms_norm(jnp.zeros((2, 32_768)), None, **options)
        with pytest.raises(ValueError, match="at least one row"):
            rowwise.rms_norm(jnp.zeros((0, 128)), None, **options)
