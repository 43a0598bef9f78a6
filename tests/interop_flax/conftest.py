"""A tiny model, and its loss as a pure function."""

import dataclasses

import jax
import pytest
from flax import nnx

from megalodon_jax.config import ModelConfig, TransformerConfig
from megalodon_jax.language_model import LanguageModel
from megalodon_jax.models import build_model

TINY = ModelConfig(
    num_layers=2, model_dim=16, z_dim=8, value_dim=16, num_heads=2, ffn_hidden_dim=24, cema_ndim=2,
    chunk_size=8, vocab_size=31, norm_num_groups=4, swiglu=True, scale_emb=True,
    # Compiles in half the time; the operations' own tests compare the implementations.
    implementation="reference",
)  # fmt: skip
TRANSFORMER = TransformerConfig(
    num_layers=2, model_dim=16, num_heads=2, ffn_hidden_dim=24, vocab_size=31
)


def make_model(config=TINY, seed: int = 0, **changes) -> LanguageModel:
    return build_model(dataclasses.replace(config, **changes), rngs=nnx.Rngs(seed))


@pytest.fixture(scope="session")
def tokens() -> jax.Array:
    """Rows of an odd length, over a chunk border."""
    return jax.random.randint(jax.random.key(1), (2, 13), 0, TINY.vocab_size)


@pytest.fixture(scope="session")
def model() -> LanguageModel:
    """A shared model: a test that changes it takes a clone."""
    return make_model()


@pytest.fixture(scope="session")
def forward():
    """The logits of a model; compiled once for each static structure."""
    return nnx.jit(lambda model, tokens: model(tokens).logits)


def next_token_loss(model, tokens: jax.Array) -> jax.Array:
    logits = jax.nn.log_softmax(model(tokens).logits[:, :-1])
    return -jax.numpy.take_along_axis(logits, tokens[:, 1:, None], axis=-1).mean()
