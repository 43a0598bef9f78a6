"""Inputs of an encoder: tokens, real values (pixels, samples of sound), patches of images."""

import math

import jax
from flax import nnx
from jax import numpy as jnp
from jax.typing import DTypeLike

from megalodon_jax.config import InitMode
from megalodon_jax.modules.embedding import Embedding
from megalodon_jax.modules.linear import Linear
from megalodon_jax.modules.parameters import axis_names, embedding_initializer, parameter
from megalodon_jax.modules.precision import at_least_float32
from megalodon_jax.parallel.sharding import constrain
from megalodon_jax.typing import Array, Float, Int32


class TokenInput(nnx.Module):
    """Embedding(token) * sqrt(D), with a table that starts at N(0, 1/D), truncated at 3 sigma.

    Args:
      vocab_size: token ids V.
      features: width D.
      dtype: of the result.
      param_dtype: of the table.
      rngs: source of initial values.
    """

    def __init__(
        self,
        vocab_size: int,
        features: int,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.scale = math.sqrt(features)
        self.embed = Embedding(
            vocab_size,
            features,
            embedding_init=embedding_initializer(features),
            embedding_metadata=axis_names("vocab", "embed"),
            dtype=jnp.dtype(dtype),
            param_dtype=jnp.dtype(param_dtype),
            rngs=rngs,
        )

    def __call__(
        self, inputs: Int32[Array, "B L"], positions: Int32[Array, "B L"]
    ) -> Float[Array, "B L D"]:
        """The embeddings; positions have no effect."""
        del positions
        x = self.embed(inputs)
        return x * jnp.asarray(self.scale, x.dtype)


class ValueInput(nnx.Module):
    """x W + b of real values with c channels; W starts at N(0, 1/c), b at N(0, 0.1^2).

    With one channel this is the authors' embedding of pixels and of samples of sound.

    Args:
      channels: values c of a token.
      features: width D.
      dtype: of the result.
      param_dtype: of W and b.
      rngs: source of initial values.
    """

    def __init__(
        self,
        channels: int,
        features: int,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dtype = jnp.dtype(dtype)
        weight = jax.random.normal(rngs.params(), (channels, features)) / math.sqrt(channels)
        bias = 0.1 * jax.random.normal(rngs.params(), (features,))
        self.weight = parameter(weight.astype(param_dtype), None, "channels")
        self.bias = parameter(bias.astype(param_dtype), "channels")

    def __call__(
        self, inputs: Float[Array, "B L c"], positions: Int32[Array, "B L"]
    ) -> Float[Array, "B L D"]:
        """The embeddings, computed in float32; positions have no effect."""
        del positions
        wide = at_least_float32(self.dtype)
        # One channel at a time: a product of so few rows would be rounded to TF32 on a GPU.
        weight, values = self.weight[...].astype(wide), inputs.astype(wide)
        x = sum(values[..., i, None] * weight[i] for i in range(len(weight)))
        x = (x + self.bias[...].astype(wide)).astype(self.dtype)
        return constrain(x, "batch", "length", "channels")


class PatchInput(nnx.Module):
    """x W + b + position of the patches of an image in raster order.

    Args:
      patch_size: numbers of a patch, such as 16 * 16 * 3.
      features: width D.
      max_positions: most patches of an image; positions start at N(0, 1/D), truncated at 3 sigma.
      init_mode: initializer of W by its released name.
      dtype: of the product and the result.
      param_dtype: of the parameters.
      rngs: source of initial values.
    """

    def __init__(
        self,
        patch_size: int,
        features: int,
        *,
        max_positions: int,
        init_mode: InitMode = "bert",
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dtype = jnp.dtype(dtype)
        self.proj = Linear(
            patch_size,
            features,
            axes=(None, "channels"),
            init_mode=init_mode,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        shape = (max_positions, features)
        start = embedding_initializer(features)(rngs.params(), shape, param_dtype)
        self.positions = parameter(start, None, "channels")

    def __call__(
        self, inputs: Float[Array, "B L P"], positions: Int32[Array, "B L"]
    ) -> Float[Array, "B L D"]:
        """The embeddings.

        Args:
          inputs: the numbers of every patch.
          positions: the number of every patch in its image; NaN where it is max_positions or more.
        """
        table = self.positions[...]
        added = jnp.take(table, positions, axis=0, mode="fill", fill_value=jnp.nan)
        x = (self.proj(inputs) + added).astype(self.dtype)
        return constrain(x, "batch", "length", "channels")


EncoderInput = TokenInput | ValueInput | PatchInput
