"""The CUDA compiler accepts the row kernels for an H200 without spilling; no GPU is needed."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from megalodon_jax.config import ModelConfig
from megalodon_jax.modules.block import Block
from pallas_kernels.common.devices import HOPPER
from pallas_kernels.rowwise.mosaic_gpu import op as mosaic_gpu
from pallas_kernels.rowwise.mosaic_gpu.block_sizes import GATE_BLOCKS, NORM_BLOCKS, THREADS
from pallas_kernels.rowwise.mosaic_gpu.kernels import LayerNorm, RmsNorm, Silu, SiluGate
from tests.topologies import compile_for, h200_device, ptxas_usage

# More blocks than this on a multiprocessor need not run at once.
MAX_RESIDENT_BLOCKS = 16


def operands(name: str, width: int):
    rows = jax.ShapeDtypeStruct((16_384, width), jnp.bfloat16)
    vector = jax.ShapeDtypeStruct((width,), jnp.float32)
    return {
        "rms_norm": (RmsNorm(width, 1e-5), (rows,), (vector,)),
        "layer_norm": (LayerNorm(width, 1e-5), (rows, rows), (vector,) * 3),
        "silu": (Silu(), (rows,), (vector,)),
        "silu_gate": (SiluGate(), (rows, rows), (vector,)),
    }[name]


@pytest.mark.parametrize(
    ("name", "width"),
    [
        *((name, width) for name in ("rms_norm", "layer_norm") for width in (1024, 2048, 4096)),
        ("silu", 2048),
        ("silu_gate", 2048),
    ],
)
def test_kernels_fit_into_registers(name, width):
    kernel, rows, vectors = operands(name, width)

    def run(rows, vectors, dy):
        y, pull_back = jax.vjp(
            lambda rows, vectors: mosaic_gpu.apply(kernel, rows, vectors, dtype=jnp.bfloat16),
            rows,
            vectors,
        )
        return y, pull_back(dy)

    compiled = compile_for(h200_device(), run, rows, vectors, rows[0])
    usage = {kernel.name: kernel for kernel in ptxas_usage(compiled)}
    choices = NORM_BLOCKS[name][width] if name in NORM_BLOCKS else GATE_BLOCKS
    for direction, choice in zip(("forward", "backward"), choices, strict=True):
        found = usage.pop(f"rowwise_{name}_{direction}")
        print(f"{found.name} at {width}: {found.registers} registers")
        assert found.spill_bytes == 0
        blocks = choice.blocks_per_multiprocessor
        fits = found.registers * THREADS * blocks <= HOPPER.registers
        assert blocks > MAX_RESIDENT_BLOCKS or fits
    assert not usage


@pytest.mark.slow
def test_model_block_uses_the_kernels(monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "check_hopper_or_blackwell", lambda name: None)
    config = ModelConfig(
        model_dim=128, z_dim=32, value_dim=256, ffn_hidden_dim=128, cema_ndim=2, chunk_size=16,
        norm_num_groups=2, dtype="bfloat16", rowwise_implementation="mosaic_gpu",
    )  # fmt: skip
    graphdef, state = nnx.split(Block.from_config(config, rngs=nnx.Rngs(0)))

    def loss(state, x):
        y = nnx.merge(graphdef, state)(x).x
        return jnp.square(y.astype(jnp.float32)).sum()

    x = jax.ShapeDtypeStruct((2, 16, 128), jnp.bfloat16)
    gradient = jax.jit(jax.grad(jax.checkpoint(loss), argnums=(0, 1)))
    program = gradient.trace(state, x).lower(lowering_platforms=("cuda",)).as_text()
    for kernel in ("rms_norm", "layer_norm", "silu", "silu_gate"):
        assert f"rowwise_{kernel}_forward_mosaic_gpu" in program
        assert f"rowwise_{kernel}_backward_mosaic_gpu" in program
