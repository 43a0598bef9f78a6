"""Triton compiles TimestepNorm's kernels for every generation of NVIDIA GPUs from Ampere on, and a
program has no others between them."""

import jax
import jax.numpy as jnp
import pytest

from megalodon_jax.compiled.hlo import parse_program
from megalodon_jax.compiled.kernels import find_kernels
from megalodon_jax.compiled.launches import count_launches
from pallas_kernels.common.devices import GPU_LIMITS
from pallas_kernels.common.target import interpreted
from pallas_kernels.common.triton import load_kernels
from pallas_kernels.timestep_norm import timestep_norm
from pallas_kernels.timestep_norm.triton import documents
from pallas_kernels.timestep_norm.triton.block_sizes import (
    GRADIENTS_UNROLL,
    MOMENTS_UNROLL,
    OUTPUTS_UNROLL,
    PROGRAMS_PER_MULTIPROCESSOR,
    SLOPES_UNROLL,
    choose_geometry,
    choose_state_block,
)
from pallas_kernels.timestep_norm.triton.launch import MODULE
from pallas_kernels.timestep_norm.triton.state_passing import MODULE as STATE_MODULE
from tests.kernels.triton_compiler import CAPABILITIES, compile_kernel
from tests.topologies import compile_for, h200_device

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
            "STARTS_EMPTY": False, "STATISTICS": statistics, "UNROLL": unroll,
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


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [4, 256, 2048])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_of_documents_fit_every_generation(kernels, capability, blocks, tmp_path):
    del kernels
    module = load_kernels(documents.MODULE)
    for kernel in (module.timestep_norm_block_documents, module.timestep_norm_token_info):
        types = dict.fromkeys(kernel.arg_names, "int32") | {"length": "i32", "split": "i32"}
        constants = {"BLOCK": documents.BLOCK, "BLOCKS": blocks, "STARTS_EMPTY": False}
        constants = {name: constants[name] for name in kernel.arg_names if name in constants}
        warps = documents.WARPS
        usage = compile_kernel(kernel, capability, types, constants, tmp_path, num_warps=warps)
        print(f"sm_{capability}: {kernel.__name__} {blocks} {usage}")
        assert usage.spilled == 0
        # Two programs run at a time.
        assert usage.registers * 32 * warps * 2 <= GPU_LIMITS[capability].registers
        assert usage.shared_memory * 2 <= GPU_LIMITS[capability].shared_memory


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("splits", [16, 128, 512, 2112])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_between_passes_fit_every_generation(kernels, capability, splits, packed, tmp_path):
    del kernels
    block = choose_state_block(splits)
    for name in ("previous_states", "next_slopes"):
        kernel = getattr(load_kernels(STATE_MODULE), f"timestep_norm_{name}")
        types = dict.fromkeys(kernel.arg_names, "float32") | dict.fromkeys(INTEGERS, "i32")
        types |= dict.fromkeys(("token_info", "initial_count", "prior_count"), "int32")
        constants = {
            "GROUPS": 64, "GB": block.groups, "SPLITS": block.splits, "PACKED": packed,
            "STARTS_EMPTY": False, "HAS_FINAL": True,
        }  # fmt: skip
        constants = {name: constants[name] for name in kernel.arg_names if name in constants}
        usage = compile_kernel(
            kernel, capability, types, constants, tmp_path, num_warps=block.warps
        )
        print(f"sm_{capability} packed {packed}: {kernel.__name__} {splits} {block} {usage}")
        assert usage.spilled == 0
        assert usage.registers * 32 * block.warps <= GPU_LIMITS[capability].registers
        assert usage.shared_memory <= GPU_LIMITS[capability].shared_memory


def compile_passes(rows, length, width, groups, *, packed):
    """The program of both passes, without gradients of the final state, for an H200."""

    def run(x, scale, bias, dy, segment_ids):
        y, pull_back = jax.vjp(
            lambda *arrays: timestep_norm(
                *arrays, num_groups=groups, segment_ids=segment_ids, implementation="triton"
            ).y,
            x, scale, bias,
        )  # fmt: skip
        return y, pull_back(dy)

    x = jax.ShapeDtypeStruct((rows, length, width), jnp.bfloat16)
    vector = jax.ShapeDtypeStruct((width,), jnp.float32)
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32) if packed else None
    return parse_program(compile_for(h200_device(), run, x, vector, vector, x, ids).as_text())


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(1, 16_384, 4096, 64), (8, 2048, 1024, 32)])
def test_passes_have_one_small_kernel_between_them(kernels, shape, packed):
    del kernels
    pytest.importorskip("jax_triton", reason="needs the extra: pip install -e '.[triton]'")
    program = compile_passes(*shape, packed=packed)
    expected = ["moments", "previous_states", "outputs", "slopes", "next_slopes", "gradients"]
    if packed:
        expected = ["block_documents", "token_info", *expected]
    found = [kernel.name for kernel in find_kernels(program)]
    assert found == [*(f"timestep_norm_{name}" for name in expected), "sum_pairs"]
    assert count_launches(program) == len(found)


def test_what_kernels_cannot_take_is_refused_by_name():
    pytest.importorskip("triton", reason="needs the extra: pip install -e '.[triton]'")
    ones = jnp.ones(2048)
    with interpreted(), pytest.raises(ValueError, match=r"at most 1024 features.*groups of 2048"):
        timestep_norm(jnp.ones((1, 8, 2048)), ones, ones, num_groups=1, implementation="triton")
