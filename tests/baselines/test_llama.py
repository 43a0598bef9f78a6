"""The Transformer against Llama of Hugging Face transformers: logits and every gradient.

Needs torch and transformers, which are not in the extras (`pip install torch transformers`).
"""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from megalodon_jax import Transformer, TransformerConfig
from megalodon_jax.loss import cross_entropy
from tests.golden_files import relative_error

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

CONFIG = TransformerConfig(
    num_layers=3, model_dim=64, num_heads=4, ffn_hidden_dim=88, vocab_size=101, rope_base=5e3
)
NAMES = {
    ("layers", "attention", "wq", "kernel"): "model.layers.{}.self_attn.q_proj.weight",
    ("layers", "attention", "wk", "kernel"): "model.layers.{}.self_attn.k_proj.weight",
    ("layers", "attention", "wv", "kernel"): "model.layers.{}.self_attn.v_proj.weight",
    ("layers", "attention", "wo", "kernel"): "model.layers.{}.self_attn.o_proj.weight",
    ("layers", "attention", "norm", "weight"): "model.layers.{}.input_layernorm.weight",
    ("layers", "feed_forward", "fc1", "kernel"): "model.layers.{}.mlp.gate_proj.weight",
    ("layers", "feed_forward", "fc3", "kernel"): "model.layers.{}.mlp.up_proj.weight",
    ("layers", "feed_forward", "fc2", "kernel"): "model.layers.{}.mlp.down_proj.weight",
    ("layers", "feed_forward", "norm", "weight"): "model.layers.{}.post_attention_layernorm.weight",
    ("embed", "embedding"): "model.embed_tokens.weight",
    ("final_norm", "weight"): "model.norm.weight",
    ("output", "kernel"): "lm_head.weight",
}


def from_llama(array: np.ndarray, path: tuple[str, ...], config: TransformerConfig) -> np.ndarray:
    """One weight, or its gradient, in our layout: (in, out), rotary pairs side by side."""
    if path[-1] != "kernel":
        return array
    array = array.T
    if path[-2] in ("wq", "wk"):
        # Llama's pairs in transformers are (j, j + d/2), ours (2j, 2j + 1).
        halves = array.reshape(array.shape[0], -1, 2, config.head_dim // 2)
        array = halves.swapaxes(2, 3).reshape(array.shape)
    return array


def in_our_layout(arrays: dict[str, np.ndarray], config: TransformerConfig) -> dict:
    converted = {}
    for path, name in NAMES.items():
        if "{}" in name:
            layers = [arrays[name.format(i)] for i in range(config.num_layers)]
            converted[path] = np.stack([from_llama(layer, path, config) for layer in layers])
        else:
            converted[path] = from_llama(arrays[name], path, config)
    return converted


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_logits_and_every_gradient(kv_heads):
    config = dataclasses.replace(CONFIG, num_kv_heads=kv_heads)
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.model_dim,
            intermediate_size=config.ffn_hidden_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=kv_heads,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_base,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
            initializer_range=0.15,
            attn_implementation="eager",
        )
    ).double()
    with torch.no_grad():
        for name, weight in llama.named_parameters():
            if "norm" in name:
                weight += 0.3 * torch.randn_like(weight)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 53))
    logits = llama(torch.tensor(ids[:, :-1])).logits
    targets = torch.tensor(ids[:, 1:])
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    weights = {name: p.detach().numpy() for name, p in llama.named_parameters()}
    gradients = {name: p.grad.numpy() for name, p in llama.named_parameters()}

    model = Transformer(config, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model, nnx.Param)
    converted = in_our_layout(weights, config)
    flat = dict(nnx.to_flat_state(state))
    assert flat.keys() == converted.keys()
    for path, value in converted.items():
        # Our norms store their scale minus one.
        value = value - 1 if path[-1] == "weight" else value
        flat[path] = flat[path].replace(value.astype(np.float32))
    state = nnx.from_flat_state(flat)
    tokens, labels = (ids[:, part].astype(np.int32) for part in (slice(-1), slice(1, None)))

    def loss(state):
        model = nnx.merge(graphdef, state)
        hidden = model.hidden(tokens).hidden
        sums = cross_entropy(hidden, model.output_matrix(), labels, np.ones(labels.shape, "f4"))
        return sums.loss_sum / labels.size, model.logits(hidden)

    with jax.default_matmul_precision("highest"):
        (_, found), found_gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(state)
    assert relative_error(np.asarray(found), logits.detach().numpy()) < 1e-5
    expected = in_our_layout(gradients, config)
    for path, gradient in nnx.to_flat_state(found_gradients):
        assert relative_error(np.asarray(gradient[...]), expected[path]) < 1e-5, path
