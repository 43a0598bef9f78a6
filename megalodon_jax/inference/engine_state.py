"""Weights and empty slots, which an engine puts on its devices when it starts."""

from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from megalodon_jax.config import AnyModelConfig, KvFormat, WeightFormat
from megalodon_jax.inference.blocks import SlotState, constrain_slots, empty_slots
from megalodon_jax.inference.decoders import cast_matrices, prepare_decoding
from megalodon_jax.inference.sampling import empty_state
from megalodon_jax.language_model import LanguageModel
from megalodon_jax.parallel.mesh import feature_sizes


def check_mesh(mesh: Mesh | None, config: AnyModelConfig, slots: int, prefill_rows: int) -> int:
    """The number of devices over which rows are sharded.

    Raises:
      ValueError: rows or features do not divide over the mesh, or it shards the sequence.
    """
    if mesh is None:
        return 1
    shape = dict(mesh.shape)
    if shape.get("chunk", 1) > 1:
        raise ValueError(f"the mesh has chunk = {shape['chunk']}; shard rows (data) or features")
    shards = shape.get("replica", 1) * shape.get("data", 1)
    for name, rows in (("slots", slots), ("prefill_rows", prefill_rows)):
        if rows % shards:
            raise ValueError(f"{name} is {rows}; use a multiple of replica * data = {shards}")
    size = shape.get("model", 1)
    if undivided := [f"{k} {n}" for k, n in feature_sizes(config).items() if n % size]:
        raise ValueError(f"{', '.join(undivided)} do not divide over model = {size} devices")
    return shards


@partial(jax.jit, static_argnums=(0, 2))
def prepare_weights(
    graphdef: nnx.GraphDef, params: nnx.State, weights: WeightFormat
) -> tuple[nnx.State, Any]:
    """Parameters for prefill with cast matrices, and weights for decoding."""
    model = nnx.merge(graphdef, params)
    return nnx.state(cast_matrices(model)), prepare_decoding(model, weights)


@partial(jax.jit, static_argnums=(0, 2, 3, 4))
def make_slots(
    graphdef: nnx.GraphDef, params: nnx.State, slots: int, max_length: int | None, kv: KvFormat
) -> SlotState:
    """Slots without requests."""
    model: LanguageModel = nnx.merge(graphdef, params)
    sampling = empty_state(slots, vocab_size=model.config.num_outputs)
    cache = model.init_cache(slots, max_length=max_length, kv=kv)
    return constrain_slots(empty_slots(cache, sampling))
