"""Tensor parallelism: products and norms against their definitions, models against one device."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.config import DataConfig, MeshConfig, ModelConfig, TrainConfig
from megalodon_jax.models import abstract_model
from megalodon_jax.modules.embedding import Embedding
from megalodon_jax.modules.linear import Linear, SharedInput
from megalodon_jax.modules.norms import LayerNorm, RMSNorm
from megalodon_jax.parallel.mesh import make_mesh
from megalodon_jax.train_state import abstract_state, init_state
from megalodon_jax.training.step import make_train_step
from megalodon_jax.typing import Batch
from tests.golden_files import relative_error
from tests.topologies import h100_device

# The batch over two devices, the length odd.
B, L, D, E, F = 2, 5, 16, 24, 32
MESHES = [
    MeshConfig(data=2, model=2),
    MeshConfig(replica=2, model=4),
    MeshConfig(data=2, model=4),
    MeshConfig(model=8),
]
IDS = ["data2-model2", "replica2-model4", "data2-model4", "model8"]

MODEL = ModelConfig(
    num_layers=1, model_dim=16, z_dim=8, value_dim=16, num_heads=4, ffn_hidden_dim=24,
    cema_ndim=2, chunk_size=8, vocab_size=32, norm_num_groups=4, swiglu=True, scan_layers=False,
)  # fmt: skip


def on_mesh(config: MeshConfig, function: Callable[..., Any], *arguments: Any) -> Any:
    sizes = (config.replica, config.data, config.chunk, config.model)
    with jax.set_mesh(make_mesh(config, jax.devices()[: math.prod(sizes)])):
        return jax.tree.map(np.asarray, jax.jit(function)(*arguments))


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


class Products(nnx.Module):
    """Two products of one input and one product back to its width, with biases."""

    def __init__(self, dtype: str, reduce_dtype: str):
        options: Any = {"dtype": dtype, "reduce_dtype": reduce_dtype, "rngs": nnx.Rngs(0)}
        self.values = Linear(D, E, axes=("embed", "value"), **options)
        self.gate = Linear(D, F, axes=("embed", "ffn"), **options)
        self.out = Linear(E, D, axes=("value", "embed"), use_bias=False, **options)
        assert self.values.bias is not None
        self.values.bias[...] = jnp.asarray(normal(5, E), jnp.float32)

    def __call__(self, x: jax.Array, h: jax.Array) -> tuple[jax.Array, ...]:
        shared: Any = SharedInput(x, self.values, self.gate)
        return self.values(shared), self.gate(shared), self.out(h)


@pytest.mark.parametrize(
    ("mesh", "dtype", "reduce_dtype", "tolerance"),
    [*((mesh, "float32", "float32", 1e-6) for mesh in MESHES),
     (MESHES[0], "float32", "bfloat16", 6e-3), (MESHES[2], "bfloat16", "float32", 1e-2)],
    ids=[*IDS, "reduce-bfloat16", "bfloat16"],
)  # fmt: skip
def test_products_and_gradients_are_those_of_whole_matrices(mesh, dtype, reduce_dtype, tolerance):
    module = Products(dtype, reduce_dtype)
    graphdef, params = nnx.split(module)
    x, h = normal(0, B, L, D), normal(1, B, L, E)
    dys = normal(2, B, L, E), normal(3, B, L, F), normal(4, B, L, D)

    def run(params, x, h, dys):
        outputs, vjp = jax.vjp(lambda params, x, h: nnx.merge(graphdef, params)(x, h), params, x, h)
        return outputs, vjp(dys)

    cast = jax.tree.map(lambda a: a.astype(np.float32), (x, h, dys))
    outputs, (d_params, dx, dh) = on_mesh(mesh, run, params, *cast)
    v, g, o = (
        np.float64(module_.kernel[...]) for module_ in (module.values, module.gate, module.out)
    )
    expected = {
        "values": (outputs[0], x @ v + normal(5, E)),
        "gate": (outputs[1], x @ g),
        "out": (outputs[2], h @ o),
        "dx": (dx, dys[0] @ v.T + dys[1] @ g.T),
        "dh": (dh, dys[2] @ o.T),
        "d values": (d_params["values"]["kernel"][...], np.einsum("bld,ble->de", x, dys[0])),
        "d gate": (d_params["gate"]["kernel"][...], np.einsum("bld,ble->de", x, dys[1])),
        "d out": (d_params["out"]["kernel"][...], np.einsum("bld,ble->de", h, dys[2])),
        "d bias": (d_params["values"]["bias"][...], dys[0].sum((0, 1))),
    }
    errors = {name: relative_error(*pair) for name, pair in expected.items()}
    assert max(errors.values()) < tolerance, errors
    if reduce_dtype == "bfloat16":
        assert errors["d gate"] > 1e-4
        assert errors["dx"] < 1e-6


def layer_norm(x, added, scale, bias, offset):
    z = x + added + offset
    z = z - z.mean(-1, keepdims=True)
    return z / jnp.sqrt((z**2).mean(-1, keepdims=True) + 1e-5) * (1 + scale) + bias


def rms_norm(x, added, scale, bias, offset):
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * (1 + scale)


@pytest.mark.parametrize(("kind", "definition"), [(LayerNorm, layer_norm), (RMSNorm, rms_norm)])
@pytest.mark.parametrize("mesh", [MESHES[0], MESHES[1]], ids=IDS[:2])
def test_norms_of_sharded_channels(kind: Any, definition: Callable[..., Any], mesh: MeshConfig):
    # The mean is far from zero and differs between devices, where mean(z^2) - mean(z)^2 loses
    # four digits.
    x = normal(0, B, L, D) + 100 + np.arange(D) // 4
    operands = (x, normal(1, B, L, D), normal(2, D), normal(3, D), normal(4, D))
    dy = normal(5, B, L, D)
    with jax.enable_x64(True):
        expected, vjp = jax.vjp(definition, *map(jnp.asarray, operands))
        expected_gradients = vjp(jnp.asarray(dy))
    module = kind(D)
    module.weight[...] = jnp.asarray(operands[2], jnp.float32)
    if kind is LayerNorm:
        module.bias[...] = jnp.asarray(operands[3], jnp.float32)
    graphdef, params = nnx.split(module)

    def normalize(params, x, added, offset):
        module = nnx.merge(graphdef, params)
        return module(x, added=added, offset=offset) if kind is LayerNorm else module(x)

    def run(dy, params, *rows):
        y, vjp = jax.vjp(normalize, params, *rows)
        return y, vjp(dy)

    rows = (np.float32(operands[i]) for i in (0, 1, 4))
    y, (d_params, dx, d_added, d_offset) = on_mesh(mesh, run, np.float32(dy), params, *rows)
    d_bias = d_params["bias"][...] if kind is LayerNorm else np.zeros(D)
    gradients = (dx, d_added, d_params["weight"][...], d_bias, d_offset)
    assert relative_error(y, np.asarray(expected)) < 1e-5
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        if np.any(wanted):
            assert relative_error(gradient, np.asarray(wanted)) < 1e-5
        else:
            assert not np.any(gradient)


def test_embedding_of_a_sharded_vocabulary():
    config = dataclasses.replace(MODEL, vocab_size=40, dtype="bfloat16")
    embed = Embedding.from_config(config, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(embed)
    tokens = np.array([[0, 9, 10, 39, 9], [31, 9, 40, -1, 20]], np.int32)
    dy = normal(0, 2, 5, D)

    def run(params, dy):
        x, vjp = jax.vjp(lambda params: nnx.merge(graphdef, params)(tokens), params)
        return x, vjp(dy)[0]

    dy = jnp.asarray(dy, jnp.bfloat16)
    x, gradient = on_mesh(MeshConfig(data=2, model=4), run, params, dy)
    known = (tokens >= 0) & (tokens < 40)
    table = np.asarray(embed.embedding[...].astype(jnp.bfloat16))
    assert np.array_equal(x[known], table[tokens[known]])
    assert np.isnan(x[~known].astype(np.float32)).all()
    expected = np.zeros((40, D))
    np.add.at(expected, tokens[known], np.float64(dy)[known])
    assert relative_error(gradient["embedding"][...], expected) < 1e-6


def loss_and_gradients(mesh_config: MeshConfig, remat: str) -> tuple[float, dict[str, np.ndarray]]:
    """The loss of a step on packed rows, and its gradients (first moments after the step)."""
    model = dataclasses.replace(MODEL, remat=remat)
    config = TrainConfig(
        model=model, mesh=mesh_config, data=DataConfig(batch_size=2, seq_len=32), steps=100,
        loss_chunk_size=24,
    )  # fmt: skip
    devices = 1 if mesh_config == MeshConfig() else 4
    mesh = make_mesh(mesh_config, jax.devices()[:devices])
    tokens = np.random.default_rng(0).integers(0, 32, (1, 2, 33)).astype(np.int32)
    segment_ids = np.ones((1, 2, 32), np.int32)
    segment_ids[0, 1, 13:], segment_ids[0, 1, 27:] = 2, 0
    weights = (segment_ids > 0).astype(np.float32)
    graphdef, state = init_state(config, mesh)
    batch = Batch(tokens[..., :-1], tokens[..., 1:], segment_ids, weights)
    state, metrics = make_train_step(graphdef, config, mesh)(state, batch)
    leaves = jax.tree.leaves_with_path(state.opt_state)
    moments = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    return float(metrics.loss), {path: leaf for path, leaf in moments.items() if ".mu" in path}


@pytest.fixture(scope="module")
def single_device() -> tuple[float, dict[str, np.ndarray]]:
    return loss_and_gradients(MeshConfig(), "none")


@pytest.mark.parametrize(
    ("mesh", "remat"),
    [
        pytest.param(MeshConfig(data=2, model=2), "none", marks=pytest.mark.slow),
        pytest.param(MeshConfig(chunk=2, model=2), "block", marks=pytest.mark.slow),
        pytest.param(MeshConfig(model=4), "dots", marks=pytest.mark.slow),
    ],
    ids=["data2-model2", "chunk2-model2", "model4"],
)
def test_a_gated_model_equals_one_device(mesh, remat, single_device):
    loss, gradients = loss_and_gradients(mesh, remat)
    assert loss == pytest.approx(single_device[0], rel=1e-6)
    assert len(gradients) > 20
    errors = {
        path: relative_error(gradient, single_device[1][path])
        for path, gradient in gradients.items()
        if np.any(single_device[1][path])
    }
    assert max(errors.values()) < 2e-5, errors


@pytest.mark.slow
def test_exchanges_on_gpus_run_beside_products_and_transpose_nothing():
    """The program for two H100s, compiled ahead of time."""
    h100_device()
    from megalodon_jax.compiled.topologies import find_devices

    layers, rows, length, width = 2, 2, 2048, 1024
    model = ModelConfig(
        num_layers=layers, model_dim=width, z_dim=256, value_dim=2048, num_heads=2,
        ffn_hidden_dim=2560, cema_ndim=4, chunk_size=2048, vocab_size=4096, dtype="bfloat16",
        scan_layers=False, remat="none",
    )  # fmt: skip
    config = TrainConfig(
        model=model, mesh=MeshConfig(model=2), data=DataConfig(batch_size=rows, seq_len=length)
    )
    mesh = make_mesh(config.mesh, find_devices("h100:2"))
    shape = (1, rows, length)
    tokens, weights = jax.ShapeDtypeStruct(shape, "int32"), jax.ShapeDtypeStruct(shape, "float32")
    step = make_train_step(abstract_model(model)[0], config, mesh)
    lowered = step.lower(abstract_state(config, mesh), Batch(tokens, tokens, None, weights))
    text = lowered.compile().as_text()
    shard = f"bf16[{rows},{length},{width // 2}]"
    starts = re.findall(r" = \(\(?(\S+?)\{(\S+?)\}.* collective-permute-start\(", text)
    synchronous = re.findall(r" = (\S+?)\{(\S+?)\} collective-permute\(", text)
    # Ten exchanges a block, and one of the embedding in each direction.
    assert len(starts) + len(synchronous) == 10 * layers + 2
    assert {name for name, _ in starts + synchronous} == {shard}
    assert {layout for _, layout in starts + synchronous} == {"2,1,0"}
    # The program is in the order of the schedule.
    beside = re.findall(r"collective-permute-start\((?s:.*?)collective-permute-done\(", text)
    is_work = re.compile(r"dot_general|cublas|mosaic_gpu")
    assert sum(bool(is_work.search(lines)) for lines in beside) >= 9 * layers
    # Devices of one process copy by their copy engines, beside the multiprocessors' products.
    modes = re.findall(r"collective-permute(?:-start)?\(.*\"collectives_mode\":\"(\w+)\"", text)
    assert modes == ["COLLECTIVES_PEER_MEMORY"] * len(starts + synchronous)
    # The second half of a product is added to the first by cuBLAS: of values, z, gate, hidden
    # features and the feed-forward network.
    assert text.count('"beta":1') >= 5 * layers
    # The loss alone brings gathered features, (B, L, 2, D / 2), into another order.
    assert not re.findall(rf"= bf16\[{rows},{length},\d+\]\S* (?:copy|transpose)\(", text)
    assert f"{shard}{{1,0,2}}" not in text
