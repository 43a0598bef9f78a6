"""A small model with all options and with no parameter at its zero initial value."""

import dataclasses
from collections.abc import Callable

import jax
import pytest
from flax import nnx

from megalodon_jax.config import ModelConfig
from megalodon_jax.language_model import ModelOutput
from megalodon_jax.model import Megalodon

SMALL = ModelConfig(
    num_layers=2, model_dim=32, z_dim=16, value_dim=32, num_heads=2, ffn_hidden_dim=40,
    cema_ndim=4, chunk_size=16, vocab_size=61, norm_num_groups=4, swiglu=True, rescale_nffn=True,
    scale_emb=True,
    # Compiles in half the time; golden models and the operations' own tests have the others.
    implementation="reference",
)  # fmt: skip


def perturbed(config: ModelConfig, seed: int = 0) -> Megalodon:
    """A model whose zero-initialized parameters are not zero, so that every path has an effect."""

    @jax.jit
    def create() -> nnx.State:
        params = nnx.state(Megalodon(config, rngs=nnx.Rngs(seed)), nnx.Param)
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
        perturbed_leaves = [
            leaf + 0.1 * jax.random.normal(key, leaf.shape, leaf.dtype)
            for leaf, key in zip(leaves, keys)
        ]
        return jax.tree.unflatten(tree, perturbed_leaves)

    abstract = nnx.eval_shape(lambda: Megalodon(config, rngs=nnx.Rngs(seed)))
    return nnx.merge(nnx.graphdef(abstract), create())


@pytest.fixture(scope="session")
def small_model() -> Megalodon:
    return perturbed(SMALL)


@pytest.fixture(scope="session")
def small_model_with_prior() -> Megalodon:
    return perturbed(dataclasses.replace(SMALL, norm_prior_count=5, share_emb=True))


@pytest.fixture(scope="session")
def jitted():
    """Returns a model's jitted call(tokens, cache=None, segment_ids=None), compiled per shape."""
    calls: dict[int, Callable[..., ModelOutput]] = {}

    def get(model: Megalodon) -> Callable[..., ModelOutput]:
        if id(model) not in calls:
            graphdef, state = nnx.split(model)
            jitted_call = jax.jit(
                lambda state, tokens, cache, segment_ids: nnx.merge(graphdef, state)(
                    tokens, segment_ids=segment_ids, cache=cache
                )
            )
            calls[id(model)] = lambda tokens, cache=None, segment_ids=None: jitted_call(
                state, tokens, cache, segment_ids
            )
        return calls[id(model)]

    return get
