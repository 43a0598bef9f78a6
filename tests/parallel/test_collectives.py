"""What devices tell each other in a training step, counted in the compiled program."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest

from megalodon_jax.config import DataConfig, MeshConfig, ModelConfig, TrainConfig
from megalodon_jax.models import abstract_model
from megalodon_jax.parallel.mesh import make_mesh
from megalodon_jax.plan.hlo import Collective, find_collectives
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
    """Of a step over eight devices, but those that tell nothing or one number."""
    step, mesh = lowered(packed, remat=remat, **sizes)
    found = find_collectives(step.compile().as_text(), mesh)
    return [one for one in found if one.group_size > 1 and one.bytes > 64]


def lowered(packed=False, remat="none", scan_layers=True, **sizes):
    """A step, and its mesh."""
    model = dataclasses.replace(CONFIG.model, remat=remat, scan_layers=scan_layers)
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(**sizes), model=model)
    mesh = make_mesh(config.mesh, jax.devices()[: math.prod(sizes.values())])
    shape = (1, ROWS, LENGTH)
    tokens, weights = jax.ShapeDtypeStruct(shape, "int32"), jax.ShapeDtypeStruct(shape, "float32")
    batch = Batch(tokens, tokens, tokens if packed else None, weights)
    graphdef = abstract_model(config.model)[0]
    return make_train_step(graphdef, config, mesh).lower(abstract_state(config, mesh), batch), mesh


def total(found, kind, axes):
    """{bytes of one: how many a step runs}."""
    counts = {}
    for one in found:
        if one.kind == kind and one.axes == axes:
            counts[one.bytes] = counts.get(one.bytes, 0) + one.count
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "block"])
def test_a_split_sequence_gathers_small_states_once_forward_and_once_back(remat):
    parts = 8
    found = collectives(chunk=parts, remat=remat)
    assert {one.axes for one in found} == {("chunk",)}
    # Of every row and part: six halves of integers, and the state.
    of_cema = parts * ROWS * (6 + 2 * WIDTH * ORDER) * FLOAT
    of_norm = parts * ROWS * (6 + 2 * GROUPS) * FLOAT
    due = {of_cema: LAYERS, of_norm: LAYERS + 1}
    assert total(found, "all-gather", ("chunk",)) == due
    assert total(found, "reduce-scatter", ("chunk",)) == due
    # What is left are gradients of parameters; never activations, the smallest of which is this.
    activations = ROWS * LENGTH // parts * min(WIDTH, CONFIG.model.z_dim) * FLOAT
    others = [one for one in found if one.kind not in ("all-gather", "reduce-scatter")]
    assert {one.kind for one in others} == {"all-reduce"}
    assert sum(one.bytes * one.count for one in others) <= 1.1 * FLOAT * count_parameters()
    assert activations not in {one.bytes for one in found}


def count_parameters():
    state = abstract_state(dataclasses.replace(CONFIG, mesh=MeshConfig(chunk=8)))
    return sum(leaf.size for leaf in jax.tree.leaves(state.params))


@pytest.mark.slow
def test_packed_rows_send_one_chunk_of_keys_and_values_besides():
    found = collectives(chunk=8, packed=True)
    model = CONFIG.model
    one_chunk = ROWS * model.chunk_size * FLOAT
    # Forward, again in the backward pass, and their gradients back.
    assert total(found, "collective-permute", ("chunk",)) == {
        one_chunk * model.z_dim: 3 * LAYERS,
        one_chunk * model.value_dim: 3 * LAYERS,
    }
    of_positions = 8 * ROWS * 6 * FLOAT
    assert total(found, "all-gather", ("chunk",))[of_positions] == 1


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 4, "model": 2}])
def test_fsdp_gathers_one_layers_weights_and_no_activations(sizes):
    found = collectives(**sizes)
    model, split = CONFIG.model, sizes.get("model", 1)
    matrices = (
        WIDTH * model.vocab_size, WIDTH * model.z_dim, WIDTH * model.value_dim,
        WIDTH * model.ffn_hidden_dim, WIDTH * WIDTH,
    )  # fmt: skip
    gathered = total(found, "all-gather", ("data",))
    assert set(gathered) == {size * FLOAT // split for size in matrices}
    # Twice a layer, forward and backward; wv, wr and wh2 are of one size, fc1 and fc2 too.
    assert gathered[WIDTH * model.value_dim * FLOAT // split] == 2 * 3 * LAYERS
    assert gathered[WIDTH * model.ffn_hidden_dim * FLOAT // split] == 2 * 2 * LAYERS
    over_both = [one for one in found if one.kind == "all-gather" and len(one.axes) > 1]
    assert not over_both
    if split > 1:
        # Tensor parallelism gathers activations: what goes into three groups of products of a block
        # once, the gradients of two results, and the same once each at the model's ends.
        activations = ROWS // sizes["data"] * LENGTH * WIDTH * FLOAT
        assert total(found, "all-gather", ("model",)) == {activations: 5 * LAYERS + 2}


@pytest.mark.parametrize(("devices", "count"), [(8, LAYERS - 1), (1, 0)])
def test_a_blocks_gradients_are_reduced_while_the_block_before_goes_backward(devices, count):
    text = lowered(scan_layers=False, data=devices)[0].as_text()
    barriers = re.findall(r"optimization_barrier (.*) : ", text)
    of_a_block = len(jax.tree.leaves(abstract_model(CONFIG.model)[1]["layers"]))
    # They, and the gradient that goes on.
    assert sum(line.count("%") == of_a_block + 1 for line in barriers) == count


def test_no_parameter_is_whole_on_any_device():
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(data=4, model=2))
    for path, leaf in jax.tree.leaves_with_path(abstract_state(config)):
        share = np.prod(leaf.sharding.shard_shape(leaf.shape)) / leaf.size if leaf.size else 1
        if leaf.size >= LAYERS * WIDTH * 16:
            assert share <= 1 / 2, jax.tree_util.keystr(path)
        if leaf.size >= LAYERS * WIDTH * WIDTH:
            assert share == 1 / 8, jax.tree_util.keystr(path)
