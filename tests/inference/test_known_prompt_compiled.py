"""The program of a known prompt compiled for an H100: few kernels, states written in place."""

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from megalodon_jax.compiled.hlo import parse_program
from megalodon_jax.compiled.launches import count_launches
from megalodon_jax.config import ModelConfig
from megalodon_jax.inference.blocks import empty_slots, pack_start
from megalodon_jax.inference.decoders import prepare_decoding
from megalodon_jax.inference.known_prompt import Continuation, start_known_row
from megalodon_jax.inference.prefix_cache import PrefixCache
from megalodon_jax.inference.sampling import Features, SamplingParams, empty_state
from megalodon_jax.model import Megalodon
from tests.kernels.in_place import copies_of
from tests.topologies import compile_lowered, h100_device

SLOTS, TOKENS = 3, 16


def compile_start(num_layers: int) -> tuple[Any, Any]:
    """The compiled program of mega200M with fewer layers, and its slots."""
    config = ModelConfig.from_preset("mega200M", dtype="bfloat16", num_layers=num_layers)

    def make():
        model = Megalodon(config, rngs=nnx.Rngs(0))
        cache = model.init_cache(SLOTS)
        tokens = Continuation(np.zeros(TOKENS, np.int32), np.int32(TOKENS))
        params = SamplingParams(temperature=0.0, max_tokens=1)
        return (
            empty_slots(cache, empty_state(SLOTS, vocab_size=config.num_outputs)),
            prepare_decoding(model),
            PrefixCache(1 << 30, config.chunk_size).warm_up(cache),
            pack_start(0, tokens, params, Features(), vocab_size=config.num_outputs),
        )

    mesh = Mesh(np.array([h100_device()]), ("device",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
        jax.eval_shape(make),
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = start_known_row.lower(*arguments, Features(), None)
    return compile_lowered(lowered), arguments[0]


@pytest.mark.slow
def test_a_layer_has_few_kernels_and_copies_no_cache():
    """TimestepNorm and CEMA, five products, three of attention, two of slots, and the count."""
    (two, _), (three, slots) = compile_start(2), compile_start(3)
    launches = [count_launches(parse_program(each.as_text())) for each in (two, three)]
    assert launches[1] - launches[0] <= 12
    leaves = jax.tree.leaves(slots.cache.layers)
    assert not copies_of(three, {leaf.shape for leaf in leaves if leaf.ndim > 2})
    memory = three.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
