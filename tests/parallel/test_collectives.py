"""The collectives of a training step, counted in the compiled program."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest

from megalodon_jax.compiled.collectives import Collective, find_collectives
from megalodon_jax.config import DataConfig, MeshConfig, ModelConfig, TrainConfig
from megalodon_jax.models import abstract_model
from megalodon_jax.parallel.mesh import make_mesh
from megalodon_jax.train_state import abstract_state
from megalodon_jax.training.step import make_train_step
from megalodon_jax.typing import Batch

LAYERS, WIDTH, ORDER, GROUPS, ROWS, LENGTH = 3, 32, 4, 4, 8, 256
CONFIG = TrainConfig(
    model=ModelConfig(
        num_layers=LAYERS, model_dim=WIDTH, z_dim=16, value_dim=64, num_heads=2,
        ffn_hidden_dim=48, cema_ndim=ORDER, chunk_size=16, vocab_size=128, norm_num_groups=GROUPS,
    ),
    data=DataConfig(batch_size=ROWS, seq_len=LENGTH),
    loss_chunk_size=512,
)  # fmt: skip
FLOAT = 4


def collectives(packed=False, remat="none", **sizes) -> list[Collective]:
    """The collectives of a step over eight devices, except those of scalars."""
    step, mesh = lowered(packed, remat=remat, **sizes)
    found = find_collectives(step.compile().as_text(), mesh)
    return [op for op in found if op.group_size > 1 and op.bytes > 64]


def lowered(packed=False, remat="none", scan_layers=True, **sizes):
    """A lowered step and its mesh."""
    model = dataclasses.replace(CONFIG.model, remat=remat, scan_layers=scan_layers)
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(**sizes), model=model)
    mesh = make_mesh(config.mesh, jax.devices()[: math.prod(sizes.values())])
    shape = (1, ROWS, LENGTH)
    tokens, weights = jax.ShapeDtypeStruct(shape, "int32"), jax.ShapeDtypeStruct(shape, "float32")
    batch = Batch(tokens, tokens, tokens if packed else None, weights)
    graphdef = abstract_model(config.model)[0]
    return make_train_step(graphdef, config, mesh).lower(abstract_state(config, mesh), batch), mesh


def total(found, kind, axes):
    """Executions per step of the collectives of a kind, by their bytes."""
    counts = {}
    for op in found:
        if op.kind == kind and op.axes == axes:
            counts[op.bytes] = counts.get(op.bytes, 0) + op.count
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "block"])
def test_context_parallelism_gathers_states_once_per_layer_and_direction(remat):
    shards = 8
    found = collectives(chunk=shards, remat=remat)
    assert {op.axes for op in found} == {("chunk",)}
    # Per row and sequence shard: three integers as six half-words, and the state.
    cema_bytes = shards * ROWS * (6 + 2 * WIDTH * ORDER) * FLOAT
    norm_bytes = shards * ROWS * (6 + 2 * GROUPS) * FLOAT
    states = {cema_bytes: LAYERS, norm_bytes: LAYERS + 1}
    weights = weights_gathered()
    assert not states.keys() & weights.keys()
    assert total(found, "all-gather", ("chunk",)) == {**weights, **states}
    scattered = total(found, "reduce-scatter", ("chunk",))
    assert {size: count for size, count in scattered.items() if size in states} == states
    assert scattered.keys() <= states.keys() | weights.keys()
    # The other collectives reduce parameter gradients.
    others = [op for op in found if op.kind not in ("all-gather", "reduce-scatter")]
    assert {op.kind for op in others} == {"all-reduce"}
    assert sum(op.bytes * op.count for op in others) <= 1.1 * FLOAT * count_parameters()


def weights_gathered() -> dict[int, int]:
    """Gathers of weights under FSDP by their bytes: forward and backward, once outside blocks."""
    model = CONFIG.model
    counts = {WIDTH * model.vocab_size: 2}
    for size in (
        model.z_dim, model.value_dim, model.value_dim, model.value_dim, WIDTH,
        model.ffn_hidden_dim, model.ffn_hidden_dim,
    ):  # fmt: skip
        counts[WIDTH * size] = counts.get(WIDTH * size, 0) + 2 * LAYERS
    return {size * FLOAT: count for size, count in counts.items()}


def count_parameters():
    state = abstract_state(dataclasses.replace(CONFIG, mesh=MeshConfig(chunk=8)))
    return sum(leaf.size for leaf in jax.tree.leaves(state.params))


@pytest.mark.slow
def test_packed_rows_also_send_one_chunk_of_keys_and_values():
    found = collectives(chunk=8, packed=True)
    model = CONFIG.model
    one_chunk = ROWS * model.chunk_size * FLOAT
    # Forward, recomputed in the backward pass, and the gradients in the other direction.
    assert total(found, "collective-permute", ("chunk",)) == {
        one_chunk * model.z_dim: 3 * LAYERS,
        one_chunk * model.value_dim: 3 * LAYERS,
    }
    position_bytes = 8 * ROWS * 6 * FLOAT
    assert total(found, "all-gather", ("chunk",))[position_bytes] == 1


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 4, "model": 2}])
def test_fsdp_gathers_weights_per_layer_and_no_activations(sizes):
    found = collectives(**sizes)
    model, model_shards = CONFIG.model, sizes.get("model", 1)
    matrices = (
        WIDTH * model.vocab_size, WIDTH * model.z_dim, WIDTH * model.value_dim,
        WIDTH * model.ffn_hidden_dim, WIDTH * WIDTH,
    )  # fmt: skip
    gathered = total(found, "all-gather", ("data",))
    assert set(gathered) == {size * FLOAT // model_shards for size in matrices}
    # Forward and backward; wv, wr and wh2 have the same size, and so have fc1 and fc2.
    assert gathered[WIDTH * model.value_dim * FLOAT // model_shards] == 2 * 3 * LAYERS
    assert gathered[WIDTH * model.ffn_hidden_dim * FLOAT // model_shards] == 2 * 2 * LAYERS
    assert not [op for op in found if op.kind == "all-gather" and len(op.axes) > 1]
    if model_shards > 1:
        # Tensor parallelism sends a shard of activations ten times a block: the inputs of three
        # groups of products, the terms of two outputs, and the gradients of these five; and once at
        # the embedding in each direction.
        tokens = ROWS // sizes["data"] * LENGTH
        shard = tokens * WIDTH // model_shards * FLOAT
        assert total(found, "collective-permute", ("model",)) == {shard: 10 * LAYERS + 2}
        # The loss gathers features; LayerNorm two moments of every token and device.
        expected = {tokens * WIDTH * FLOAT: 1, model_shards * tokens * 2 * FLOAT: LAYERS}
        assert total(found, "all-gather", ("model",)) == expected


@pytest.mark.parametrize(("devices", "count"), [(8, LAYERS - 1), (1, 0)])
@pytest.mark.slow
def test_gradient_reduction_of_a_block_overlaps_the_next_backward(devices, count):
    text = lowered(scan_layers=False, data=devices)[0].as_text()
    barriers = re.findall(r"optimization_barrier (.*) : ", text)
    num_params = len(jax.tree.leaves(abstract_model(CONFIG.model)[1]["layers"]))
    # The parameters' gradients and the gradient of the block's input.
    assert sum(line.count("%") == num_params + 1 for line in barriers) == count


def test_every_large_parameter_is_sharded():
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(data=4, model=2))
    for path, leaf in jax.tree.leaves_with_path(abstract_state(config)):
        fraction = np.prod(leaf.sharding.shard_shape(leaf.shape)) / leaf.size if leaf.size else 1
        if leaf.size >= LAYERS * WIDTH * 16:
            assert fraction <= 1 / 2, jax.tree_util.keystr(path)
        if leaf.size >= LAYERS * WIDTH * WIDTH:
            assert fraction == 1 / 8, jax.tree_util.keystr(path)
