"""Which Mosaic GPU kernels the CUDA compiler accepts for Blackwell; nobody has run them there."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.mosaic.gpu import core

from pallas_kernels import chunk_attention
from tests.topologies import KernelUsage, blackwell_device, compile_for

BF16 = jnp.bfloat16
shape = jax.ShapeDtypeStruct
# Most bytes of registers that all kernels of a case may spill together.
MOST_SPILLED = {"cema": 0, "cema packed": 768, "rowwise": 0, "timestep_norm": 4096}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [100, 120])
def test_kernels_without_wgmma_compile(capability):
    blackwell_device(capability)
    if capability != 100 and not hasattr(core, "artificial_shared_memory_limit"):
        pytest.skip("this jax cannot compile for a GPU with less shared memory than Hopper")
    command = [sys.executable, "-m", "tests.kernels.compile_for_blackwell", str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == set(MOST_SPILLED)
    if capability == 120:
        assert "needs 120832 bytes of shared memory" in found.pop("timestep_norm")
    for name, kernels in found.items():
        usage = [KernelUsage(*kernel) for kernel in kernels]
        for kernel in usage:
            text = f"{kernel.name} {kernel.registers}, {kernel.spill_bytes} B spilled"
            print(f"sm_{capability}: {text}")
        assert usage
        assert sum(kernel.spill_bytes for kernel in usage) <= MOST_SPILLED[name]


ATTENTION = """
import jax, jax.numpy as jnp
from pallas_kernels import chunk_attention
from pallas_kernels.chunk_attention.mosaic_gpu import op
from tests.topologies import blackwell_device, compile_for

op.check_hopper = lambda name: None
q = jax.ShapeDtypeStruct((1, 1024, 1, 64), jnp.bfloat16)
v = jax.ShapeDtypeStruct((1, 1024, 1, 256), jnp.bfloat16)
def run(q, k, v):
    return chunk_attention.chunk_attention(q, k, v, chunk_size=1024, implementation="mosaic_gpu")
compile_for(blackwell_device(100), run, q, q, v)
"""


@pytest.mark.slow
def test_attention_needs_wgmma_and_is_refused_by_name():
    """Its instructions do not exist on Blackwell: the compiler ends the process."""
    blackwell_device(100)
    done = subprocess.run([sys.executable, "-c", ATTENTION], capture_output=True, text=True)
    print(done.stderr[-2000:])
    assert done.returncode != 0
    assert "wgmma" in done.stderr.lower() or done.returncode < 0

    def run(q, k, v):
        options = {"chunk_size": 1024, "implementation": "mosaic_gpu"}
        return chunk_attention.chunk_attention(q, k, v, **options)

    q, v = shape((1, 1024, 1, 64), BF16), shape((1, 1024, 1, 256), BF16)
    with pytest.raises(ValueError, match=r"needs an NVIDIA Hopper GPU, this is gpu \(NVIDIA B200"):
        compile_for(blackwell_device(100), run, q, q, v)
