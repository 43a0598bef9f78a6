"""Triton compiles the attention kernels for every generation of NVIDIA GPUs from Ampere on."""

from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import pytest

from megalodon_jax.compiled.hlo import parse_program
from megalodon_jax.compiled.kernels import find_kernels
from pallas_kernels.chunk_attention import chunk_attention
from pallas_kernels.chunk_attention.triton.block_sizes import Pass, choose_tiles
from pallas_kernels.chunk_attention.triton.launch import MODULE
from pallas_kernels.common.devices import GPU_LIMITS
from pallas_kernels.common.triton import load_kernels
from tests.kernels.triton_compiler import TritonUsage, compile_kernel
from tests.topologies import compile_for, h200_device

INTEGERS = ("start", "stop", "first_query", "end_query")
# Key and value width of a head: all sizes of MEGALODON; Image of Long Range Arena; ListOps.
MEGA, IMAGE, LISTOPS = (256, 2048), (96, 320), (64, 160)
# sm_89 has the instructions and limits of sm_86.
CASES = [(MEGA, capability) for capability in (80, 86, 90, 100, 120)]
CASES += [(IMAGE, 120), (LISTOPS, 86)]


def compile_pass(
    which: Pass, widths: tuple[int, int], capability: int, folder: Any, dtype: str = "bfloat16"
) -> TritonUsage | None:
    """Resources of a kernel at its tiles; None if heads of this width do not need it."""
    limit = GPU_LIMITS[capability].shared_memory
    tiles = choose_tiles("forward", *widths, dtype, limit)
    if tiles.is_narrow and which in ("output", "value_gradient"):
        return None
    tiles = choose_tiles(which, *widths, dtype, limit)
    kernel = getattr(load_kernels(MODULE), f"chunk_attention_{which}")
    types = dict.fromkeys(kernel.arg_names, dtype) | dict.fromkeys(INTEGERS, "int32")
    types |= dict.fromkeys(("lse", "delta"), "float32")
    types |= dict.fromkeys(("num_queries", "num_keys"), "i32")
    constants = {
        "HEADS": 2, "DK": widths[0], "DV": widths[1], "KEY_BLOCK": tiles.key_block,
        "KEY_SLICE": tiles.key_slice, "VALUE_BLOCK": tiles.value_block,
        "QUERIES": tiles.queries, "KEYS": tiles.keys, "IS_NARROW": tiles.is_narrow,
    }  # fmt: skip
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    usage = compile_kernel(
        kernel, capability, types, constants, folder, num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )  # fmt: skip
    print(f"sm_{capability} {which} {widths} {dtype}: {usage} {tiles}", flush=True)
    assert usage.registers * 32 * tiles.num_warps <= GPU_LIMITS[capability].registers
    return usage


@pytest.mark.slow
@pytest.mark.parametrize(("widths", "capability"), CASES)
def test_kernels_fit_every_generation(widths, capability, tmp_path):
    pytest.importorskip("triton", reason="needs the extra: pip install -e '.[triton]'")
    for which in get_args(Pass):
        usage = compile_pass(which, widths, capability, tmp_path)
        if usage is not None:
            assert usage.spilled == 0
            assert usage.shared_memory <= GPU_LIMITS[capability].shared_memory


@pytest.mark.slow
def test_a_program_with_the_kernels_compiles_for_hopper():
    """Both passes of a causal and a non-causal call, with the names that reports look for."""
    for package in ("triton", "jax_triton"):
        pytest.importorskip(package, reason="needs the extra: pip install -e '.[triton]'")

    def run(q, v, do):
        def attend(v):
            causal, encoder = (
                chunk_attention(q, q, v, chunk_size=32, causal=c, implementation="triton").out
                for c in (True, False)
            )
            return causal + encoder

        out, pull_back = jax.vjp(attend, v)
        return out, pull_back(do)

    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    q, v = shape((2, 100, 2, 16)), shape((2, 100, 2, 32))
    text = compile_for(h200_device(), run, q, v, v).as_text()
    assert text is not None
    kernels = find_kernels(parse_program(text))
    assert sorted(kernel.name for kernel in kernels) == [
        f"chunk_attention_{name}" for name in ("forward", "forward", "key_gradient", "key_gradient")
    ]
    assert {(kernel.operation, kernel.implementation) for kernel in kernels} == {
        ("chunk_attention", "triton")
    }
