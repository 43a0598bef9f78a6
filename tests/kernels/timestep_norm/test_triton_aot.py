"""Triton compiles TimestepNorm's kernels for every generation of NVIDIA GPUs from Ampere on."""

import jax.numpy as jnp
import pytest

from pallas_kernels.common.devices import GPU_LIMITS
from pallas_kernels.common.target import interpreted
from pallas_kernels.common.triton import load_kernels
from pallas_kernels.timestep_norm import timestep_norm
from pallas_kernels.timestep_norm.triton.block_sizes import (
    GRADIENTS_UNROLL,
    MOMENTS_UNROLL,
    OUTPUTS_UNROLL,
    PROGRAMS_PER_MULTIPROCESSOR,
    SLOPES_UNROLL,
    choose_geometry,
)
from pallas_kernels.timestep_norm.triton.launch import MODULE
from tests.kernels.triton_compiler import CAPABILITIES, compile_kernel

KERNELS = {
    "moments": MOMENTS_UNROLL,
    "outputs": OUTPUTS_UNROLL,
    "slopes": SLOPES_UNROLL,
    "gradients": GRADIENTS_UNROLL,
}
INTEGERS = ("tiles", "tiles_per_split", "num_splits")


@pytest.fixture(scope="module")
def kernels():
    pytest.importorskip("triton", reason="needs the extra: pip install -e '.[triton]'")
    return load_kernels(MODULE)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("features", "groups"), [(64, 64), (32, 32), (48, 16)])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_fit_every_generation(kernels, capability, features, groups, packed, tmp_path):
    geometry = choose_geometry(1, 16_384, groups, features)
    statistics = 3 if packed else 2
    block = 1 << (features - 1).bit_length()
    for name, unroll in KERNELS.items():
        kernel = getattr(kernels, f"timestep_norm_{name}")
        types = dict.fromkeys(kernel.arg_names, "float32") | dict.fromkeys(INTEGERS, "i32")
        types |= dict.fromkeys(("x", "y", "dy", "dx"), "bfloat16")
        types |= dict.fromkeys(("token_info", "has_initial", "initial_count"), "int32")
        constants = {
            "GROUPS": groups, "GB": geometry.groups_per_block, "F": block, "WIDTH": features,
            "FEATURES": features, "EACH": 1 / features, "D": groups * features, "EPS": 1e-5,
            "NUM_SPLITS": 8, "FIRST_SPLIT": 1, "NUM_SLOPES": 7, "SAVE": True, "PACKED": packed,
            "STATISTICS": statistics, "UNROLL": unroll,
        }  # fmt: skip
        constants = {name: constants[name] for name in kernel.arg_names if name in constants}
        usage = compile_kernel(kernel, capability, types, constants, tmp_path, num_warps=1)
        print(f"sm_{capability} packed {packed}: {kernel.__name__} {features} {usage}")
        assert usage.spilled == 0
        # All programs of one warp run at a time on Hopper, 15 of 16 at least elsewhere, where
        # `gradients` has up to 130 registers.
        warps = PROGRAMS_PER_MULTIPROCESSOR - (0 if capability == 90 else 1)
        assert usage.registers * 32 * warps <= GPU_LIMITS[capability].registers
        # A warp's vectors change their layout before the loop.
        assert usage.shared_memory * warps <= GPU_LIMITS[capability].shared_memory


def test_what_kernels_cannot_take_is_refused_by_name():
    pytest.importorskip("triton", reason="needs the extra: pip install -e '.[triton]'")
    ones = jnp.ones(2048)
    with interpreted(), pytest.raises(ValueError, match=r"at most 1024 features.*groups of 2048"):
        timestep_norm(jnp.ones((1, 8, 2048)), ones, ones, num_groups=1, implementation="triton")
