"""Triton compiles CEMA's kernels for every generation of NVIDIA GPUs from Ampere on."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from megalodon_jax.compiled.hlo import parse_program
from megalodon_jax.compiled.kernels import find_kernels
from pallas_kernels.cema import CemaParams, cema
from pallas_kernels.cema.triton.block_sizes import BACKWARD_UNROLL, FORWARD_UNROLL
from pallas_kernels.common.devices import GPU_LIMITS
from pallas_kernels.common.triton import load_kernels
from tests.kernels.triton_compiler import CAPABILITIES, compile_kernel
from tests.topologies import compile_for, h200_device

MODULE = "pallas_kernels.cema.triton.kernels"
SEQUENCES = ("x", "y", "dy", "dx")
INTEGERS = ("tiles", "tiles_per_split", "num_splits", "num_summaries")
DOCUMENTS = ("boundary_bits", "row_ends", "passes_state_through")
# Constants, and registers that let the intended number of blocks run at a time.
KERNELS = {
    "cema_summaries": (
        {"FIRST_SPLIT": 0, "NUM_SUMMARIES": 15, "BACKWARD": True, "UNROLL": FORWARD_UNROLL}, 128,
    ),
    "cema_outputs": ({"SAVE": True, "UNROLL": FORWARD_UNROLL}, 168),
    "cema_gradients": ({"UNROLL": BACKWARD_UNROLL}, 255),
}  # fmt: skip


def most_spilled(name: str, capability: int) -> int:
    """Bytes of a thread: a few coefficients of the gradients, which fill all registers."""
    if name != "cema_gradients":
        return 8
    return 352 if capability == 120 else 48


@pytest.fixture(scope="module")
def kernels():
    pytest.importorskip("triton", reason="needs the extra: pip install -e '.[triton]'")
    return load_kernels(MODULE)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_fit_every_generation(kernels, capability, packed, tmp_path):
    limits = GPU_LIMITS[capability]
    for name, (constants, most_registers) in KERNELS.items():
        kernel = getattr(kernels, name)
        types = dict.fromkeys(kernel.arg_names, "float32")
        types |= dict.fromkeys(SEQUENCES, "bfloat16")
        types |= dict.fromkeys(INTEGERS, "i32") | dict.fromkeys(DOCUMENTS, "int32")
        shared = {"N": 16, "P": 16, "WIDTH": 4096, "PACKED": packed, "HAS_INITIAL": True}
        usage = compile_kernel(kernel, capability, types, shared | constants, tmp_path)
        print(f"sm_{capability} packed {packed}: {name} {usage}")
        assert usage.registers <= most_registers
        assert usage.spilled <= most_spilled(name, capability)
        # Sums over orders stay in a thread: no shared memory, which every card has.
        assert usage.shared_memory == 0 <= limits.shared_memory


@pytest.mark.slow
def test_a_program_with_the_kernels_compiles_for_hopper():
    for package in ("triton", "jax_triton"):
        pytest.importorskip(package, reason="needs the extra: pip install -e '.[triton]'")
    rows, length, channels, order = 2, 512, 256, 16

    def run(x, params, dy):
        out, pull_back = jax.vjp(lambda *a: cema(*a, implementation="triton").y, x, params)
        return out, pull_back(dy)

    shape = jax.ShapeDtypeStruct
    matrix, vector = shape((channels, order), jnp.float32), shape((channels,), jnp.float32)
    params = CemaParams(matrix, matrix, vector, shape((channels, order, 2), jnp.float32), vector)
    x = shape((rows, length, channels), jnp.bfloat16)
    text = compile_for(h200_device(), run, x, params, x).as_text()
    assert text is not None
    kernels = find_kernels(parse_program(text))
    assert sorted(kernel.name for kernel in kernels) == [
        "cema_gradients", "cema_outputs", "cema_summaries", "cema_summaries",
    ]  # fmt: skip
    assert {(kernel.operation, kernel.implementation) for kernel in kernels} == {("cema", "triton")}


def test_rematerialization_drops_kernels_whose_results_are_saved(monkeypatch):
    for package in ("triton", "jax_triton"):
        pytest.importorskip(package, reason="needs the extra: pip install -e '.[triton]'")
    monkeypatch.setattr("pallas_kernels.cema.triton.op.check_triton", lambda name: None)
    policy = jax.checkpoint_policies.save_only_these_names("cema")
    matrix = jnp.zeros((128, 4))
    params = CemaParams(matrix, matrix, jnp.zeros(128), jnp.zeros((128, 4, 2)), jnp.zeros(128))

    @partial(jax.checkpoint, policy=policy)
    def loss(x):
        return jnp.square(cema(x, params, implementation="triton", block_size=32).y).sum()

    program = str(jax.make_jaxpr(jax.grad(loss))(jnp.zeros((1, 64, 128))))
    # Summaries and outputs forward, summaries and gradients backward.
    assert program.count("triton_kernel_call[") == 4


def test_triton_kernels_are_refused_on_cpu_and_without_the_extra(monkeypatch):
    if jax.default_backend() != "cpu":
        pytest.skip("tests the error on a CPU")
    matrix = jnp.zeros((3, 5))
    params = CemaParams(matrix, matrix, jnp.zeros(3), jnp.zeros((3, 5, 2)), jnp.zeros(3))
    with pytest.raises(ValueError, match=r"compute capability 8\.0.*this is cpu"):
        cema(jnp.zeros((2, 8, 3)), params, implementation="triton")
    from pallas_kernels.common import triton as launcher

    monkeypatch.setattr(launcher.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(launcher, "is_interpreted", lambda: True)
    with pytest.raises(ValueError, match=r"pip install .*megalodon-flax\[triton\]"):
        cema(jnp.zeros((2, 8, 3)), params, implementation="triton")
