"""Which Mosaic GPU kernels the CUDA compiler accepts for Blackwell; nobody has run them there."""

import contextlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.mosaic.gpu import core

from pallas_kernels import cema, chunk_attention, rowwise, timestep_norm
from pallas_kernels.common.devices import GPU_LIMITS
from tests.topologies import blackwell_device, compile_for, ptxas_usage

BF16 = jnp.bfloat16
shape = jax.ShapeDtypeStruct


def gradients(function, *arguments):
    def run(dy, *arguments):
        y, pull_back = jax.vjp(function, *arguments)
        return y, pull_back(dy)

    return run, (arguments[0], *arguments)


def cema_case(packed):
    matrix, vector = shape((256, 16), jnp.float32), shape((256,), jnp.float32)
    params = cema.CemaParams(matrix, matrix, vector, shape((256, 16, 2), jnp.float32), vector)
    ids = jnp.ones((2, 512), jnp.int32) if packed else None

    def run(x, params):
        return cema.cema(x, params, segment_ids=ids, implementation="mosaic_gpu").y

    return gradients(run, shape((2, 512, 256), BF16), params)


def rowwise_case():
    def run(x, scale, bias):
        options = {"eps": 1e-5, "dtype": BF16, "implementation": "mosaic_gpu"}
        return rowwise.layer_norm(x, scale, bias, **options)

    vector = shape((1024,), jnp.float32)
    return gradients(run, shape((512, 1024), BF16), vector, vector)


def timestep_norm_case():
    def run(x, scale, bias):
        options = {"num_groups": 32, "implementation": "mosaic_gpu"}
        return timestep_norm.timestep_norm(x, scale, bias, **options).y

    vector = shape((1024,), jnp.float32)
    return gradients(run, shape((1, 512, 1024), BF16), vector, vector)


@contextlib.contextmanager
def shared_memory_of(capability):
    """Ahead of time the compiler assumes Hopper's shared memory."""
    limit = getattr(core, "artificial_shared_memory_limit", None)
    if capability == 100:
        yield
    elif limit is None:
        pytest.skip("this jax cannot compile for a GPU with less shared memory than Hopper")
    else:
        with limit(GPU_LIMITS[capability].shared_memory):
            yield


@pytest.mark.slow
@pytest.mark.parametrize("capability", [100, 120])
@pytest.mark.parametrize(
    ("case", "most_spilled"),
    [
        (lambda: cema_case(packed=False), 0),
        (lambda: cema_case(packed=True), 768),
        (rowwise_case, 0),
        (timestep_norm_case, 4096),
    ],
    ids=["cema", "cema packed", "rowwise", "timestep_norm"],
)
def test_kernels_without_wgmma_compile(case, most_spilled, capability):
    function, arguments = case()
    if case is timestep_norm_case and capability == 120:
        with pytest.raises(ValueError, match="needs 120832 bytes of shared memory"):
            compile_for(blackwell_device(capability), function, *arguments)
        return
    with shared_memory_of(capability):
        usage = ptxas_usage(compile_for(blackwell_device(capability), function, *arguments))
    for kernel in usage:
        print(f"sm_{capability}: {kernel.name} {kernel.registers}, {kernel.spill_bytes} B spilled")
    assert usage
    assert sum(kernel.spill_bytes for kernel in usage) <= most_spilled


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
