"""The linear layer of every block."""

from flax import nnx
from jax import numpy as jnp

from megalodon_jax.config import ModelConfig
from megalodon_jax.modules.parameters import kernel_initializer, parameter
from megalodon_jax.typing import Array, Float


class Linear(nnx.Module):
    """X W + b: the product in `config.dtype`, the bias added in float32.

    Returns float32, so that the pointwise work that follows rounds once, at its end; it also makes
    the bias gradient a float32 sum.

    Args:
      config: start values (`init_mode`) and types.
      in_features: rows of W.
      out_features: columns of W.
      axes: logical names of W's two axes, for sharding.
      use_bias: whether b is there; it starts at zero.
      rngs: source of start values.
    """

    def __init__(
        self,
        config: ModelConfig,
        in_features: int,
        out_features: int,
        axes: tuple[str, str],
        *,
        use_bias: bool,
        rngs: nnx.Rngs,
    ):
        dtype = jnp.dtype(config.param_dtype)
        initialize = kernel_initializer(config.init_mode)
        self.dtype = config.dtype
        self.kernel = parameter(
            initialize(rngs.params(), (in_features, out_features), dtype), *axes
        )
        self.bias = parameter(jnp.zeros(out_features, dtype), axes[1]) if use_bias else None

    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        """Maps the last axis of x; see the class for types."""
        y = jnp.matmul(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        y = y.astype(jnp.promote_types(y.dtype, jnp.float32))
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)
