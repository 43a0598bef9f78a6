"""The Transformer encoder: a definition in float64, packing, padding, meshes, sizes, runs."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

from megalodon_jax import TransformerEncoderConfig
from megalodon_jax.config import AnyEncoderConfig, load_config
from megalodon_jax.errors import ConfigError
from megalodon_jax.flops import model_flops_per_token
from megalodon_jax.models import abstract_model
from megalodon_jax.parallel.mesh import check_fits, mesh_sizes
from megalodon_jax.presets import configs_dir
from tests.encoder.small_models import check_mesh, draw_inputs, model_of, rows_of, run
from tests.golden_files import relative_error

SMALL = TransformerEncoderConfig(
    input="values", input_size=2, num_layers=2, model_dim=16, num_heads=2, ffn_hidden_dim=20,
    num_classes=3, chunk_size=4, init_mode="xavier",
)  # fmt: skip
FULL = dataclasses.replace(
    SMALL, input="tokens", input_size=1, vocab_size=12, chunk_size=None, rope_base=100.0
)
DROPOUTS = ("", "hidden_", "attention_")
DOCUMENTS = [[5, 9, 2], [16], [1, 3, 8]]


def scores_of_document(params, config: TransformerEncoderConfig, inputs) -> np.ndarray:
    """Scores of one document (L, ...) in NumPy and float64, one head and one chunk at a time."""

    def norm(x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * (1 + weight)

    def silu(x):
        return x / (1 + np.exp(-x))

    def rotated(x):
        d = x.shape[-1]
        angles = np.arange(len(x))[:, None] * config.rope_base ** (-2.0 * np.arange(d // 2) / d)
        turned = (x[:, 0::2] + 1j * x[:, 1::2]) * np.exp(1j * angles)
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape)

    if config.input == "tokens":
        x = params["inputs", "embed", "embedding"][inputs] * np.sqrt(config.model_dim)
    else:
        x = inputs @ params["inputs", "weight"] + params["inputs", "bias"]
    d, length = config.model_dim // config.num_heads, len(inputs)
    size = config.chunk_size or length
    for layer in range(config.num_layers):
        own = {path[1:]: leaf[layer] for path, leaf in params.items() if path[0] == "layers"}
        n = norm(x, own["attention", "norm", "weight"])
        q, k, v = (n @ own["attention", name, "kernel"] for name in ("wq", "wk", "wv"))
        attended = np.zeros_like(q)
        for start in range(0, length, size):
            for head in range(config.num_heads):
                at = (slice(start, start + size), slice(head * d, (head + 1) * d))
                weights = np.exp(rotated(q[at]) @ rotated(k[at]).T / np.sqrt(d))
                attended[at] = weights / weights.sum(-1, keepdims=True) @ v[at]
        x = x + attended @ own["attention", "wo", "kernel"]
        n = norm(x, own["feed_forward", "norm", "weight"])
        gate, up = (n @ own["feed_forward", name, "kernel"] for name in ("fc1", "fc3"))
        x = x + (silu(gate) * up) @ own["feed_forward", "fc2", "kernel"]
    x = norm(x, params["final_norm", "weight"])
    pooled = silu(x @ params["pool", "proj", "kernel"] + params["pool", "proj", "bias"] + x)
    return pooled.mean(0) @ params["head", "kernel"]


@pytest.mark.parametrize("config", [SMALL, FULL], ids=["chunks of values", "full, tokens"])
def test_scores_and_every_gradient_equal_the_definition(config: TransformerEncoderConfig):
    """Packed rows, which the definition takes document by document.

    Each parameter's gradient is compared along a random direction with a central difference.
    """
    ids = rows_of(DOCUMENTS, 24)
    inputs = draw_inputs(config, ids.shape)
    graphdef, params = model_of(config)
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(3, 3, 3)).astype(np.float32)
    is_document = np.array([[n < len(d) for n in range(3)] for d in DOCUMENTS])

    def loss(params):
        scores = nnx.merge(graphdef, params)(inputs, segment_ids=ids, max_documents=3)
        scores = jnp.where(is_document[..., None], scores, 0.0)
        return jnp.sum(jnp.sin(scores) * weights), scores

    (_, scores), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    wide = {path: np.asarray(leaf[...], np.float64) for path, leaf in nnx.to_flat_state(params)}
    documents = {(row, n): inputs[row, ids[row] == n + 1] for row, n in np.argwhere(is_document)}

    def exact(params) -> tuple[float, dict]:
        found = {at: scores_of_document(params, config, each) for at, each in documents.items()}
        return sum(float(np.sum(np.sin(x) * weights[at])) for at, x in found.items()), found

    for at, expected in exact(wide)[1].items():
        assert relative_error(scores[at], expected) <= 1e-5
    for path, gradient in nnx.to_flat_state(gradients):
        direction = rng.normal(size=wide[path].shape)
        step = 1e-5 / np.linalg.norm(direction)
        high, low = (exact({**wide, path: wide[path] + by * direction})[0] for by in (step, -step))
        slope = (high - low) / (2 * step)
        scale = np.linalg.norm(gradient[...]) * np.linalg.norm(direction)
        assert abs(np.sum(gradient[...] * direction) - slope) <= 1e-5 * scale, path


def test_padding_changes_nothing_and_more_documents_are_seen():
    inputs = draw_inputs(SMALL, (2, 13))
    expected = run(SMALL, inputs)
    for before, after in ((0, 11), (8, 3)):
        padded = np.pad(inputs, ((0, 0), (before, after), (0, 0)), constant_values=5)
        ids = np.pad(np.ones((2, 13), np.int32), ((0, 0), (before, after)))
        assert relative_error(run(SMALL, padded, ids), expected) <= 1e-5
    ids = rows_of(DOCUMENTS, 24)
    found = run(SMALL, draw_inputs(SMALL, ids.shape), ids, max_documents=2)
    assert np.isnan(found).reshape(3, -1).any(axis=1).tolist() == [True, False, True]


def test_aligned_documents_give_the_same():
    """Rows whose documents begin at chunks, as the loader lays them."""
    ids = rows_of(DOCUMENTS, 24, align=4)
    inputs = draw_inputs(SMALL, ids.shape)
    aligned, plain = (
        run(SMALL, inputs, ids, max_documents=3, aligned=aligned) for aligned in (True, False)
    )
    assert relative_error(aligned, plain) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"chunk": 4}, {"data": 2, "model": 2}])
def test_meshes_equal_one_device(sizes: dict[str, int]):
    check_mesh(FULL if "chunk" in sizes else SMALL, sizes)


@pytest.mark.slow
def test_dropout_and_remat_and_unrolled_blocks():
    inputs = draw_inputs(SMALL, (2, 13))
    _, params = model_of(SMALL)
    others = [
        dataclasses.replace(SMALL, scan_layers=False, remat="block"),
        *(dataclasses.replace(SMALL, **{f"{name}dropout": 0.3}) for name in DROPOUTS),
    ]

    def runner(config: TransformerEncoderConfig):
        graphdef, _ = model_of(config)
        return jax.jit(lambda params, key: nnx.merge(graphdef, params)(inputs, dropout_key=key))

    def gradient(config: TransformerEncoderConfig):
        scores = runner(config)
        return jax.jit(jax.grad(lambda params: jnp.sum(jnp.square(scores(params, None)))))(params)

    for a, b in zip(*map(jax.tree.leaves, map(gradient, (SMALL, others[0]))), strict=True):
        assert relative_error(a, b) <= 1e-5
    expected = run(SMALL, inputs)
    for config in others[1:]:
        scores = runner(config)
        first, again, second = (scores(params, jax.random.key(seed)) for seed in (0, 0, 1))
        assert np.array_equal(first, again)
        assert relative_error(second, first) > 0.02
        assert relative_error(first, expected) > 0.02


def count_parameters(config: AnyEncoderConfig) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_model(config)[1]))


@pytest.mark.parametrize("name", ["listops", "fashion_mnist"])
def test_shipped_sizes_are_those_of_the_encoder(name: str):
    encoder, transformer = (
        load_config(configs_dir() / f"tasks/{file}.toml") for file in (name, f"{name}_transformer")
    )
    assert transformer.model.kind == "transformer_encoder"
    sizes = [count_parameters(run.model) for run in (encoder, transformer)]
    assert abs(sizes[1] / sizes[0] - 1) < 0.02
    for run_of in (encoder, transformer):
        assert run_of.task == encoder.task
        assert run_of.steps == encoder.steps
        assert (run_of.model.num_layers, run_of.model.model_dim) == (
            encoder.model.num_layers, encoder.model.model_dim
        )  # fmt: skip


def test_flops_count_every_matrix_product():
    config = dataclasses.replace(SMALL, num_layers=3)
    dense = sum(2 * a * b for a, b in [(16, 16)] * 4 + [(16, 20)] * 2 + [(20, 16)])
    # Every token sees the four keys of its chunk, twice.
    attention = 2 * 2 * 4 * 16
    expected = 3 * (3 * (dense + attention) + 2 * 16 * 16)
    assert model_flops_per_token(config, seq_len=24) == expected


def test_what_is_refused():
    with pytest.raises(ConfigError, match="model_dim 16 over num_heads 3"):
        dataclasses.replace(SMALL, num_heads=3)
    with pytest.raises(ConfigError, match=r"head is 'tokens'.*input is 'values'"):
        dataclasses.replace(SMALL, head="tokens")
    config = load_config(configs_dir() / "tasks/listops_transformer.toml")
    mesh = dataclasses.replace(config.mesh, model=4)
    with pytest.raises(ConfigError, match=r"model\.num_heads 5 does not divide"):
        check_fits(config, mesh_sizes(mesh, 4))
