"""The Transformer against a definition in float64: logits, every gradient, streaming, meshes."""

import dataclasses
import math
import operator
from typing import NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

from megalodon_jax import Transformer, TransformerConfig
from megalodon_jax.checkpoints import load_model, save_model
from megalodon_jax.config import DataConfig, MeshConfig, TrainConfig
from megalodon_jax.errors import ConfigError, ConvertError, MismatchError
from megalodon_jax.generate import generate
from megalodon_jax.interop.convert import convert
from megalodon_jax.parallel.mesh import check_fits, make_mesh, mesh_sizes
from megalodon_jax.train_state import init_state
from megalodon_jax.training.step import make_train_step
from megalodon_jax.typing import Batch
from tests.golden_files import relative_error

SMALL = TransformerConfig(
    num_layers=2, model_dim=32, num_heads=4, ffn_hidden_dim=44, vocab_size=48, init_mode="xavier"
)
VARIANTS = {
    "full": SMALL,
    "grouped, window, tied": dataclasses.replace(
        SMALL, num_kv_heads=2, attention_window=9, share_emb=True, rope_base=500.0
    ),
    "no positions": dataclasses.replace(SMALL, rope_base=None),
}
B, L = 2, 37


def make(config: TransformerConfig) -> Transformer:
    """A model whose norm scales are not 1."""
    model = Transformer(config, rngs=nnx.Rngs(0))
    keys = iter(jax.random.split(jax.random.key(1), 3))
    for norm in (
        model.layers.attention.norm, model.layers.feed_forward.norm, model.final_norm,
    ):  # fmt: skip
        assert norm.weight is not None
        norm.weight[...] = 0.3 * jax.random.normal(next(keys), norm.weight.shape)
    return model


def tokens_and_targets() -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, 48, (B, L + 1)).astype(np.int32)
    return tokens[:, :-1], tokens[:, 1:]


def definition(params, config: TransformerConfig, tokens, segment_ids):
    """Logits by Touvron et al. 2023, one head at a time; rotations are complex products."""

    def norm(x, weight):
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * (1 + weight)

    def rotated(x, positions):
        d = x.shape[-1]
        if config.rope_base is None:
            return x
        angles = positions[..., None] * config.rope_base ** (-2.0 * np.arange(d // 2) / d)
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * jnp.exp(1j * angles)
        return jnp.stack([turned.real, turned.imag], -1).reshape(x.shape)

    index = np.arange(tokens.shape[1])
    seen = index[:, None] >= index
    if config.attention_window:
        seen = seen & (index[:, None] - index < config.attention_window)
    same = segment_ids[:, :, None] == segment_ids[:, None]
    seen = np.where(segment_ids[:, :, None] == 0, np.eye(len(index), dtype=bool), seen & same)
    first = np.argmax(same, axis=-1)
    positions = (index - first).astype(np.float64)
    d, group = config.head_dim, config.num_heads // config.kv_heads
    x = params["embed"]["embedding"][tokens]
    for layer in range(config.num_layers):
        attention, feed_forward = (
            jax.tree.map(operator.itemgetter(layer), params["layers"][name])
            for name in ("attention", "feed_forward")
        )
        n = norm(x, attention["norm"]["weight"])
        outputs = []
        for head in range(config.num_heads):
            own, shared = (slice(i * d, (i + 1) * d) for i in (head, head // group))
            q = rotated(n @ attention["wq"]["kernel"][:, own], positions)
            k = rotated(n @ attention["wk"]["kernel"][:, shared], positions)
            scores = jnp.einsum("btd,bsd->bts", q, k) / math.sqrt(d)
            weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
            outputs.append(weights @ (n @ attention["wv"]["kernel"][:, shared]))
        x = x + jnp.concatenate(outputs, -1) @ attention["wo"]["kernel"]
        n = norm(x, feed_forward["norm"]["weight"])
        gate = n @ feed_forward["fc1"]["kernel"]
        hidden = gate / (1 + jnp.exp(-gate)) * (n @ feed_forward["fc3"]["kernel"])
        x = x + hidden @ feed_forward["fc2"]["kernel"]
    n = norm(x, params["final_norm"]["weight"])
    return n @ (params["embed"]["embedding"].T if config.share_emb else params["output"]["kernel"])


def mean_loss(logits, targets, weights):
    """Mean of -log softmax of the targets."""
    shifted = logits - logits.max(-1, keepdims=True)
    log_probs = shifted - jnp.log(jnp.exp(shifted).sum(-1, keepdims=True))
    chosen = jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
    return -(chosen * weights).sum() / weights.sum()


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_logits_and_every_gradient_equal_the_definition(config):
    model, (tokens, targets) = make(config), tokens_and_targets()
    # Two documents and padding in row 0, three documents in row 1.
    segment_ids = np.repeat([[1, 2, 0], [1, 2, 3]], [14, 20, 3], axis=1).astype(np.int32)
    weights = (segment_ids > 0).astype(np.float64)
    graphdef, state = nnx.split(model, nnx.Param)

    def loss(state):
        logits, _ = nnx.merge(graphdef, state)(tokens, segment_ids=segment_ids)
        return mean_loss(logits, targets, weights.astype(np.float32)), logits

    (_, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(state)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(state))

        def exact_loss(params):
            logits = definition(params, config, tokens, segment_ids)
            return mean_loss(logits, targets, weights), logits

        gradient_of = jax.jit(jax.value_and_grad(exact_loss, has_aux=True))
        (_, exact_logits), exact = gradient_of(params)
        exact_logits, exact = jax.device_get((exact_logits, exact))
    is_token = segment_ids > 0
    assert relative_error(np.asarray(logits)[is_token], exact_logits[is_token]) < 1e-5
    found = dict(nnx.to_flat_state(gradients))
    expected = dict(nnx.traversals.flatten_mapping(exact))
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert relative_error(np.asarray(gradient[...]), expected[name]) < 1e-5, name


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.slow
def test_streaming_equals_one_call(config):
    model, (tokens, _) = make(config), tokens_and_targets()
    expected = model(tokens).logits
    step = nnx.jit(lambda model, tokens, cache: model(tokens, cache=cache))
    cache = model.init_cache(B, max_length=L)
    pieces = []
    for start, stop in ((0, 13), (13, 14), (14, 15), (15, 28), (28, 37)):
        logits, cache = step(model, tokens[:, start:stop], cache)
        pieces.append(logits)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), expected, atol=1e-5)
    assert list(cache.position) == [L, L]


@pytest.mark.slow
def test_cache_grows_or_refuses():
    model, (tokens, _) = make(SMALL), tokens_and_targets()
    with pytest.raises(ValueError, match="pass max_length"):
        model.init_cache(B)
    cache = model.init_cache(B, max_length=10)
    assert cache.num_slots == 128
    with pytest.raises(OverflowError, match="129 more tokens after position 0"):
        cache.check_room(129)
    _, cache = model(tokens, cache=cache)
    longer = model.with_room(cache, 300)
    assert longer.num_slots == 512
    # The larger cache holds the same tokens.
    after = [model(tokens[:, :1], cache=each).logits for each in (cache, longer)]
    # The number of slots changes the order of the sums.
    assert relative_error(*after) <= 2e-6
    windowed = make(VARIANTS["grouped, window, tied"])
    ring = windowed.init_cache(B)
    assert ring.is_ring
    assert windowed.with_room(ring, 10_000) is ring
    # 150 tokens overwrite the ring's 128 slots.
    long = np.tile(tokens, (1, 5))[:, :150]
    for start in range(0, 150, 50):
        logits, ring = windowed(long[:, start : start + 50], cache=ring)
    np.testing.assert_allclose(logits, windowed(long).logits[:, 100:], atol=1e-5)


@pytest.mark.slow
def test_a_new_document_restarts_a_row():
    model, (tokens, _) = make(SMALL), tokens_and_targets()
    cache = model.init_cache(B, max_length=2 * L)
    _, cache = model(tokens, segment_ids=np.full((B, L), 1, np.int32), cache=cache)
    segment_ids = np.stack([np.full(L, 2), np.full(L, 1)]).astype(np.int32)
    logits, cache = model(tokens, segment_ids=segment_ids, cache=cache)
    alone, twice = model(tokens[:1]).logits, model(np.tile(tokens[1:], (1, 2))).logits
    np.testing.assert_allclose(logits[0], alone[0], atol=1e-5)
    np.testing.assert_allclose(logits[1], twice[0, L:], atol=1e-5)
    assert list(cache.position) == [L, 2 * L]


@pytest.mark.slow
def test_greedy_tokens_are_those_of_the_full_pass():
    model, (tokens, _) = make(SMALL), tokens_and_targets()
    lengths = np.array([9, 5])
    out = generate(model, tokens[:, :9], lengths, max_tokens=12, temperature=0.0)
    for row, length in enumerate(lengths):
        text = np.concatenate([tokens[row, :length], out[row]])
        best = np.argmax(model(text[None]).logits[0], axis=-1)
        np.testing.assert_array_equal(best[length - 1 : -1], out[row])


class Trained(NamedTuple):
    losses: np.ndarray
    params: dict


@pytest.fixture(scope="module")
def train():
    """Trains three steps on packed rows, over a mesh."""
    config = TrainConfig(
        model=dataclasses.replace(SMALL, num_kv_heads=2, vocab_size=64, ffn_hidden_dim=48),
        data=DataConfig(batch_size=8, seq_len=32),
        loss_chunk_size=64,
        steps=100,
    )
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (1, 8, 33)).astype(np.int32)
    segment_ids = 1 + (np.arange(32) >= rng.integers(0, 32, (1, 8, 1))).astype(np.int32)
    segment_ids[0, 2, 20:] = 0
    weights = (segment_ids > 0).astype(np.float32)
    batch = Batch(tokens[..., :-1], tokens[..., 1:], segment_ids, weights)

    def run(mesh_config: MeshConfig, **changes) -> Trained:
        run_config = dataclasses.replace(
            config, mesh=mesh_config, model=dataclasses.replace(config.model, **changes)
        )
        devices = jax.devices()[:1] if mesh_config == MeshConfig() else None
        mesh = make_mesh(mesh_config, devices)
        graphdef, state = init_state(run_config, mesh)
        step = make_train_step(graphdef, run_config, mesh)
        losses = []
        for _ in range(3):
            state, metrics = step(state, batch)
            losses.append(float(metrics.loss))
        params = {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(state.params)}
        return Trained(np.array(losses), params)

    return run


@pytest.fixture(scope="module")
def on_one_device(train):
    return train(MeshConfig())


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(data=8), MeshConfig(replica=4, model=2), MeshConfig(replica=2, data=2, model=2)],
    ids=["fsdp", "replica, model", "three axes"],
)
def test_meshes_train_like_one_device(train, on_one_device, mesh):
    trained = train(mesh)
    np.testing.assert_allclose(trained.losses, on_one_device.losses, rtol=1e-5)
    for name, value in trained.params.items():
        np.testing.assert_allclose(value, on_one_device.params[name], atol=2e-5, err_msg=str(name))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"remat": "inputs"},
        {"remat": "dots", "scan_layers": False},
        {"remat": "block"},
        {"scan_layers": False},
    ],
    ids=str,
)
def test_rematerialization_changes_nothing(train, on_one_device, changes):
    trained = train(MeshConfig(), **changes)
    np.testing.assert_allclose(trained.losses, on_one_device.losses, rtol=1e-5)
    assert on_one_device.losses[-1] < on_one_device.losses[0]


def test_the_sequence_is_not_sharded():
    config = TrainConfig(model=SMALL, data=DataConfig(batch_size=8, seq_len=64))
    with pytest.raises(ConfigError, match=r"mesh\.chunk is 8, but attention of a transformer"):
        check_fits(config, mesh_sizes(MeshConfig(chunk=8), 8))
    grouped = dataclasses.replace(config, model=dataclasses.replace(SMALL, num_kv_heads=2))
    with pytest.raises(ConfigError, match=r"model\.kv_heads 2 does not divide by mesh\.model = 4"):
        check_fits(grouped, mesh_sizes(MeshConfig(replica=2, model=4), 8))


def test_a_run_directory_holds_the_model(tmp_path):
    model, (tokens, _) = make(dataclasses.replace(SMALL, vocab_size=257)), tokens_and_targets()
    config = TrainConfig(model=model.config)
    save_model(model, tmp_path / "run", config)
    loaded = load_model(tmp_path / "run")
    assert loaded.config.model == model.config
    np.testing.assert_array_equal(loaded.model(tokens).logits, model(tokens).logits)
    with pytest.raises(ConvertError, match="holds only MEGALODON"):
        convert(tmp_path / "run", tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "model_dim 32 over num_heads 3"),
        ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"attention_window": 0}, "attention_window is 0; must be at least 1"),
        ({"attention_implementation": "flash"}, "attention_implementation is 'flash'"),
        ({"dtype": "float16"}, "needs loss scaling"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_a_checkpoint_of_another_kind_is_refused():
    from megalodon_jax.checkpoints.compatibility import check_same_model
    from megalodon_jax.config import ModelConfig

    with pytest.raises(MismatchError, match="is of a transformer, the run asks for a megalodon"):
        check_same_model(SMALL, ModelConfig(), "step 3")
