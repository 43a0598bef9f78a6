"""How parameters are made: start values and the names of their axes."""

import math
from typing import Any

import jax
from flax import nnx
from jax import numpy as jnp
from jax.nn import initializers
from jax.nn.initializers import Initializer

from megalodon_jax.typing import Array


def truncated_normal(std: float, bound: float) -> Initializer:
    """Normal numbers of deviation `std`, redrawn outside [-bound, bound]."""

    def init(key: Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
        draws = jax.random.truncated_normal(key, -bound / std, bound / std, shape, jnp.float32)
        return (std * draws).astype(dtype)

    return init


def embedding_initializer(model_dim: int) -> Initializer:
    """Start values of the embedding and of the output matrix: N(0, 1/D) truncated at 3 sigma."""
    std = 1.0 / math.sqrt(model_dim)
    return truncated_normal(std, 3.0 * std)


def kernel_initializer(init_mode: str) -> Initializer:
    """Start values of a linear layer's weight, by the released names."""
    match init_mode:
        case "he":  # Kaiming normal with a = sqrt(5), torch's default for linear layers
            return initializers.variance_scaling(1.0 / 3.0, "fan_in", "normal")
        case "xavier":
            return initializers.xavier_uniform()
        case "bert":
            return initializers.normal(0.02)
        case "gaussian":
            return truncated_normal(1.0, 3.0)
        case _:
            raise ValueError(
                f"init_mode {init_mode!r} is unknown; use he, xavier, bert or gaussian"
            )


def parameter(value: Array, *axes: str | None) -> nnx.Param:
    """A Param that remembers the logical names of its axes (`None`: never split)."""
    return nnx.Param(value, **axis_names(*axes))


def axis_names(*axes: str | None) -> dict[str, Any]:
    """Param metadata for logical axis names; eager_sharding=False keeps it valid without a mesh."""
    return {"out_sharding": axes, "eager_sharding": False}
