"""The normalized feed-forward network, the second sub-layer of a block."""

from typing import Any, Self

from flax import nnx
from jax import numpy as jnp
from jax.typing import DTypeLike

from megalodon_jax.config import InitMode, ModelConfig
from megalodon_jax.modules.activations import silu, silu_gate
from megalodon_jax.modules.dropout import dropout, dtype_before_dropout, fold_key, split_key
from megalodon_jax.modules.linear import Linear, SharedInput
from megalodon_jax.modules.matmul import PRODUCT
from megalodon_jax.modules.norms import LayerNorm
from megalodon_jax.modules.parameters import parameter
from megalodon_jax.typing import Array, Float, Float32, PRNGKey
from pallas_kernels.common.dispatch import Implementation


class FeedForward(nnx.Module):
    """silu(n W1) W2, or (silu(n W1) * (n W3)) W2 with SwiGLU, where n = LayerNorm(y).

    There are no biases but with `hidden_bias`: silu(n W1 + b1), as in the authors' encoders.

    Args:
      features: width D of input and output.
      hidden_features: hidden width F.
      swiglu: gate the hidden activations.
      hidden_bias: whether b1 is there.
      rescale_start: the result is multiplied by a learned vector `alpha` with this initial value;
        None: it is not.
      norm_eps: added to LayerNorm's variance.
      norm_affine: LayerNorm has a learned scale and bias.
      init_mode: initializer of the weights by its released name.
      dropout: dropped fraction of the result.
      hidden_dropout: dropped fraction of the hidden activations.
      dtype: of products and activations; the result is float32.
      param_dtype: of the weights.
      reduce_dtype: in which devices sum their gradients of the matrices.
      implementation: of LayerNorm and SiLU, see `pallas_kernels.rowwise`; None: the fastest known.
      rngs: source of initial values.
    """

    def __init__(
        self,
        features: int,
        hidden_features: int,
        *,
        swiglu: bool = False,
        hidden_bias: bool = False,
        rescale_start: Array | float | None = None,
        norm_eps: float = 1e-5,
        norm_affine: bool = True,
        init_mode: InitMode = "he",
        dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        reduce_dtype: DTypeLike = jnp.float32,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        self.hidden_dropout = hidden_dropout
        self.output_dropout = dropout
        self.dtype = jnp.dtype(dtype)
        self.implementation: Implementation | None = implementation
        dtypes: Any = {"dtype": dtype, "param_dtype": param_dtype}
        self.norm = LayerNorm(
            features, eps=norm_eps, affine=norm_affine, implementation=implementation, **dtypes
        )

        def linear(
            rows: int, columns: int, axes: tuple[str, str], *, use_bias: bool = False
        ) -> Linear:
            return Linear(
                rows,
                columns,
                use_bias=use_bias,
                axes=axes,
                init_mode=init_mode,
                reduce_dtype=reduce_dtype,
                rngs=rngs,
                **dtypes,
            )

        self.fc1 = linear(features, hidden_features, ("embed", "ffn"), use_bias=hidden_bias)
        self.fc2 = linear(hidden_features, features, ("ffn", "embed"))
        self.fc3 = linear(features, hidden_features, ("embed", "ffn")) if swiglu else None
        self.alpha = (
            None
            if rescale_start is None
            else parameter(jnp.full(features, rescale_start, param_dtype), "channels")
        )

    @classmethod
    def from_config(
        cls, config: ModelConfig, *, rescale_start: Array | float = 0.0, rngs: nnx.Rngs
    ) -> Self:
        """The feed-forward network of a model's block; `rescale_start` depends on its depth."""
        return cls(
            config.model_dim,
            config.ffn_hidden_dim,
            swiglu=config.swiglu,
            rescale_start=rescale_start if config.rescale_nffn else None,
            norm_eps=config.norm_eps,
            norm_affine=config.norm_affine,
            init_mode=config.init_mode,
            dropout=config.dropout,
            hidden_dropout=config.hidden_dropout,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            reduce_dtype=config.reduce_dtype,
            implementation=config.implementation_of("rowwise"),
            rngs=rngs,
        )

    def __call__(
        self,
        y: Float[Array, "B L D"],
        *,
        added: Float[Array, "B L D"] | None = None,
        offset: Float[Array, " D"] | None = None,
        dropout_key: PRNGKey | None = None,
    ) -> Float32[Array, "B L D"]:
        """The output for y + added + offset, in float32, before the residual is added."""
        hidden_key, output_key = split_key(dropout_key, 2)
        normed = self.norm(y, added=added, offset=offset)
        gates = () if self.fc3 is None else (self.fc3,)
        normed = SharedInput(normed, self.fc1, *gates, dropout_key=fold_key(dropout_key, 0))
        product = self.fc1.product(normed, name=PRODUCT)
        options = {
            "features": "ffn",
            "dtype": dtype_before_dropout(self.dtype, self.hidden_dropout, hidden_key),
            "implementation": self.implementation,
        }
        if self.fc3 is None:
            hidden = silu(product, self.fc1.offset, **options)
        else:
            hidden = silu_gate(
                product, self.fc1.offset, self.fc3.product(normed, name=PRODUCT), **options
            )
        hidden = dropout(hidden, self.hidden_dropout, hidden_key)
        out = self.fc2(hidden, dropout_key=fold_key(dropout_key, 1))
        out = dropout(out, self.output_dropout, output_key)
        return out if self.alpha is None else out * self.alpha[...].astype(out.dtype)
