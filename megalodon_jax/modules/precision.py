"""The dtype of sums, norms and everything else that is not computed in the model's dtype."""

from typing import Any

from jax import numpy as jnp
from jax.typing import DTypeLike


def at_least_float32(dtype: DTypeLike) -> Any:
    """float32 for float32 and bfloat16; float64 for float64, in which a model can be checked."""
    return jnp.promote_types(dtype, jnp.float32)
