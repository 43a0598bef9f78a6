"""Streaming with a cache sharded over rows and features, against one device."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

from megalodon_jax import Megalodon, ModelConfig
from megalodon_jax.cache import cache_shardings
from megalodon_jax.config import MeshConfig
from megalodon_jax.parallel.mesh import make_mesh
from megalodon_jax.parallel.sharding import shardings_of

CONFIG = ModelConfig(
    num_layers=2, model_dim=32, z_dim=16, value_dim=32, num_heads=2, ffn_hidden_dim=48,
    cema_ndim=4, chunk_size=8, vocab_size=64, norm_num_groups=4, norm_prior_count=3,
)  # fmt: skip
PIECES = (11, 1, 11, 1)


def stream(model, tokens, cache):
    """Logits of the pieces and the final cache."""
    call = nnx.jit(lambda model, tokens, cache: model(tokens, cache=cache))
    outputs, start = [], 0
    for length in PIECES:
        logits, cache = call(model, tokens[:, start : start + length], cache)
        outputs.append(logits)
        start += length
    return jnp.concatenate(outputs, axis=1), cache


@pytest.mark.slow
def test_a_sharded_cache_equals_an_unsharded_one():
    model = Megalodon(CONFIG, rngs=nnx.Rngs(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (4, sum(PIECES))), jnp.int32)
    expected, expected_cache = stream(model, tokens, model.init_cache(4))
    mesh = make_mesh(MeshConfig(data=2, model=2), jax.devices()[:4])
    graphdef, params = nnx.split(model, nnx.Param)
    sharded = nnx.merge(graphdef, jax.device_put(params, shardings_of(params, mesh)))
    shardings = cache_shardings(mesh, CONFIG)
    with jax.set_mesh(mesh):
        logits, cache = stream(sharded, tokens, jax.device_put(model.init_cache(4), shardings))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)
    leaves = zip(*map(jax.tree.leaves, (cache, expected_cache, shardings)), strict=True)
    for actual, expected, sharding in leaves:
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)
        assert actual.sharding.is_equivalent_to(sharding, actual.ndim)
    keys = cache.layers[0].keys_and_values.key
    assert keys.addressable_shards[0].data.size == keys.size // 4
