"""The small model of these tests, and what plain full forward passes say about its tokens."""

import functools

import jax
import numpy as np
from flax import nnx

from megalodon_jax.config import ModelConfig
from megalodon_jax.model import Megalodon
from tests.model.conftest import perturbed

CHUNK = 16
VOCAB = 62
CONFIG = ModelConfig(
    num_layers=2, model_dim=32, z_dim=16, value_dim=32, num_heads=2, ffn_hidden_dim=40,
    cema_ndim=4, chunk_size=CHUNK, vocab_size=VOCAB, norm_num_groups=4, swiglu=True,
    rescale_nffn=True,
    # Compiles in half the time; `test_prefill` has the fastest implementations.
    implementation="reference",
)  # fmt: skip
LONGEST = 192


@functools.cache
def small_model() -> Megalodon:
    return perturbed(CONFIG)


@functools.cache
def _forward():
    graphdef, params = nnx.split(small_model())
    return jax.jit(lambda tokens: nnx.merge(graphdef, params)(tokens).logits)


def next_logits(tokens) -> np.ndarray:
    """Scores after the last token, by a forward pass over all of them."""
    padded = np.zeros((1, LONGEST), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(_forward()(padded))[0, len(tokens) - 1]


def greedy(prompt, count: int) -> list[int]:
    """The most probable continuation, by a forward pass for every token."""
    tokens = [int(token) for token in prompt]
    for _ in range(count):
        tokens.append(int(np.argmax(next_logits(tokens))))
    return tokens[len(prompt) :]


def random_prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, length).astype(np.int32)


def set_row[T](state: T, slot: int, row: T) -> T:
    """The state of several rows with one row, which has no leading axis, written to a slot."""
    return jax.tree.map(lambda rows, new: rows.at[slot].set(new), state, row)
