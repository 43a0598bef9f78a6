"""A block of decoding steps compiled for an H100: the cache is updated in place by the kernels."""

import re
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from megalodon_jax.config import KvFormat, ModelConfig
from megalodon_jax.inference.blocks import decode_block, empty_slots
from megalodon_jax.inference.decoders import prepare_decoding
from megalodon_jax.inference.sampling import Features, empty_state
from megalodon_jax.model import Megalodon
from tests.topologies import compile_lowered, h100_device

LAYERS, STEPS = 2, 4


def lower_block(
    slots: int, rows: int, layers: int, kv: KvFormat = "model"
) -> tuple[Any, list[jax.ShapeDtypeStruct]]:
    """The lowered block of mega200M with fewer layers, and the leaves of its layers' caches."""
    config = ModelConfig.from_preset("mega200M", dtype="bfloat16", num_layers=layers)

    def make():
        model = Megalodon(config, rngs=nnx.Rngs(0))
        sampling = empty_state(slots, vocab_size=config.num_outputs)
        return prepare_decoding(model), empty_slots(model.init_cache(slots, kv=kv), sampling)

    mesh = Mesh(np.array([h100_device()]), ("device",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    weights, state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
        jax.eval_shape(make),
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = decode_block.lower(weights, state, rows, STEPS, Features(), None)
    return lowered, jax.tree.leaves(state.cache.layers)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.slow
def test_layers_share_the_kernels(rows: int):
    """A kernel is compiled once: a second or more each."""
    counts = [
        lower_block(rows, rows, layers)[0].as_text().count("@mosaic_gpu") for layers in (2, 4)
    ]
    assert counts[0] == counts[1] > 0


@pytest.mark.slow
def test_a_layer_has_no_kernels_of_the_compiler():
    """Queries, keys, rounding to 8 bits: all is in the kernels, at one row too."""
    texts = [compile_lowered(lower_block(2, 1, layers, "int8")[0]).as_text() for layers in (2, 3)]
    opcodes = [re.findall(r" (fusion|copy|custom-call)\(", text) for text in texts]
    more = {name: opcodes[1].count(name) - opcodes[0].count(name) for name in set(opcodes[0])}
    assert more["custom-call"] > 0
    assert more["fusion"] == 0
    # The layer's count is written once a block.
    assert more["copy"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("slots", "rows", "kv"), [(2, 2, "model"), (16, 8, "model"), (16, 8, "int8"), (64, 64, "model")]
)
def test_a_block_copies_no_cache(slots: int, rows: int, kv: KvFormat):
    lowered, leaves = lower_block(slots, rows, LAYERS, kv)
    compiled = compile_lowered(lowered)
    text = compiled.as_text()
    shapes = {f"[{','.join(map(str, leaf.shape))}]" for leaf in leaves if leaf.ndim > 2}
    moved = [
        line
        for line in text.splitlines()
        if re.search(r" (copy|broadcast|concatenate|transpose)\(", line)
        and any(shape in line.split(" = ")[1].split("{")[0] for shape in shapes)
    ]
    assert not moved
    cache_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes <= 0.02 * cache_bytes
    kernels = set(re.findall(r'op_name="[^"]*/(\w+)/mpmd_map"', text))
    products = "skinny_matmul", "skinny_matmul_tensor_cores", "skinny_matmul_wide"
    products = products[(rows > 4) + (rows > 16)]
    assert kernels == {"norm_state_step", "chunk_decode_splits", "chunk_decode_combine", products}
