"""The normalized feed-forward network, the second hop of a block."""

from flax import nnx
from jax import numpy as jnp

from megalodon_jax.config import DType, ModelConfig
from megalodon_jax.modules.activations import silu, silu_gate
from megalodon_jax.modules.dropout import dropout, gate_dtype, split_key
from megalodon_jax.modules.linear import PRODUCT, Linear
from megalodon_jax.modules.norms import LayerNorm
from megalodon_jax.modules.parameters import parameter
from megalodon_jax.typing import Array, Float, PRNGKey
from pallas_kernels.common.dispatch import Implementation


class FeedForward(nnx.Module):
    """silu(n W1) W2, or (silu(n W1) * (n W3)) W2 with SwiGLU, where n = LayerNorm(y); no biases.

    With `rescale_nffn` the result is multiplied by a learned vector `alpha` that starts at
    `rescale_start`.
    """

    def __init__(self, config: ModelConfig, rescale_start: Array | float, *, rngs: nnx.Rngs):
        D, F = config.model_dim, config.ffn_hidden_dim
        self.hidden_dropout = config.hidden_dropout
        self.output_dropout = config.dropout
        self.dtype: DType = config.dtype
        self.implementation: Implementation | None = config.implementation_of("rowwise")
        self.norm = LayerNorm(config)
        self.fc1 = Linear(config, D, F, ("embed", "ffn"), use_bias=False, rngs=rngs)
        self.fc2 = Linear(config, F, D, ("ffn", "embed"), use_bias=False, rngs=rngs)
        self.fc3 = (
            Linear(config, D, F, ("embed", "ffn"), use_bias=False, rngs=rngs)
            if config.swiglu
            else None
        )
        self.alpha = (
            parameter(jnp.full(D, rescale_start, config.param_dtype), "channels")
            if config.rescale_nffn
            else None
        )

    def __call__(
        self,
        y: Float[Array, "B L D"],
        *,
        added: Float[Array, "B L D"] | None = None,
        offset: Float[Array, " D"] | None = None,
        dropout_key: PRNGKey | None = None,
    ) -> Float[Array, "B L D"]:
        """The network's output for y + added + offset, in float32, before the residual is added."""
        hidden_key, output_key = split_key(dropout_key, 2)
        normed = self.norm(y, added=added, offset=offset)
        product = self.fc1.product(normed, name=PRODUCT)
        options = {
            "features": "ffn",
            "dtype": gate_dtype(self.dtype, self.hidden_dropout, hidden_key),
            "implementation": self.implementation,
        }
        if self.fc3 is None:
            hidden = silu(product, None, **options)
        else:
            hidden = silu_gate(product, None, self.fc3.product(normed, name=PRODUCT), **options)
        out = self.fc2(dropout(hidden, self.hidden_dropout, hidden_key))
        out = dropout(out, self.output_dropout, output_key)
        return out if self.alpha is None else out * self.alpha[...].astype(out.dtype)
