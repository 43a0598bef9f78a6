"""Initial values of parameters, and the logical names of their axes."""

import math
from typing import Any

import jax
from flax import nnx
from jax import numpy as jnp
from jax.nn import initializers
from jax.nn.initializers import Initializer

from megalodon_jax.typing import Array


def truncated_normal(std: float, bound: float) -> Initializer:
    """Initializer N(0, std^2), truncated to [-bound, bound]."""

    def init(key: Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
        samples = jax.random.truncated_normal(key, -bound / std, bound / std, shape, jnp.float32)
        return (std * samples).astype(dtype)

    return init


def embedding_initializer(model_dim: int) -> Initializer:
    """Initializer of the embedding and the output matrix: N(0, 1/D) truncated at 3 sigma."""
    std = 1.0 / math.sqrt(model_dim)
    return truncated_normal(std, 3.0 * std)


def kernel_initializer(init_mode: str) -> Initializer:
    """Initializer of a linear layer's weight, by its released name."""
    match init_mode:
        case "he":  # Kaiming normal with a = sqrt(5): torch's default for linear layers
            return initializers.variance_scaling(1.0 / 3.0, "fan_in", "normal")
        case "xavier":
            return initializers.xavier_uniform()
        case "bert":
            return initializers.normal(0.02)
        case "gaussian":
            return truncated_normal(1.0, 3.0)
        case _:
            raise ValueError(
                f"init_mode is {init_mode!r}; use 'he', 'xavier', 'bert' or 'gaussian'"
            )


def parameter(value: Array, *axes: str | None) -> nnx.Param:
    """A Param with logical axis names (None: not sharded)."""
    return nnx.Param(value, **axis_names(*axes))


def axis_names(*axes: str | None) -> dict[str, Any]:
    """Metadata of a Param with logical axis names.

    `eager_sharding=False` makes it valid without a mesh (flax 0.12.12).
    """
    return {"out_sharding": axes, "eager_sharding": False}
