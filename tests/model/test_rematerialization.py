"""Norms and gates that a block's backward pass recomputes with `remat = "off"` and `"none"`."""

import jax
import pytest
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.config import ModelConfig, Remat
from megalodon_jax.model import Megalodon

LAYERS = 2
# RMSNorm, the values, their gate; LayerNorm and the gate of the feed-forward network.
ACTIVATIONS = 5


def count_activations(remat: Remat, *, scan_layers: bool) -> int:
    """Norms and gates in the program of the gradient, forward and recomputed."""
    config = ModelConfig(
        num_layers=LAYERS, model_dim=16, z_dim=8, value_dim=16, num_heads=2, ffn_hidden_dim=24,
        swiglu=True, cema_ndim=3, chunk_size=8, vocab_size=61, norm_num_groups=4, remat=remat,
        scan_layers=scan_layers,
    )  # fmt: skip
    graphdef, params = nnx.split(
        nnx.eval_shape(lambda: Megalodon(config, rngs=nnx.Rngs(0))), nnx.Param
    )

    def loss(params: nnx.State) -> jax.Array:
        hidden, _ = nnx.merge(graphdef, params).hidden(jnp.zeros((2, 19), jnp.int32))
        return jnp.sum(jnp.sin(hidden))

    return str(jax.make_jaxpr(jax.grad(loss))(params)).count("name=activation")


@pytest.mark.parametrize("scan_layers", [True, False])
def test_off_recomputes_no_norm_and_no_gate(scan_layers: bool):
    forward = ACTIVATIONS * (1 if scan_layers else LAYERS)
    assert count_activations("off", scan_layers=scan_layers) == forward
    assert count_activations("none", scan_layers=scan_layers) > forward
