"""Drop path, or stochastic depth (Huang et al. 2016): training skips sub-layers of documents."""

import jax
from jax import numpy as jnp

from megalodon_jax.modules.documents import at_tokens
from megalodon_jax.parallel.sharding import partition_spec, shard_map_logical
from megalodon_jax.typing import Array, Float, Float32, Int32, PRNGKey


def draw_path_scales(
    key: PRNGKey, rate: float, *, num_layers: int, shape: tuple[int, int]
) -> Float32[Array, "S 2 B M"]:
    """Factors of the sub-layers' outputs, of every layer, sub-layer and document.

    A factor is 0 at the layer's rate p, else 1 / (1 - p), so that its mean is 1. The rates rise
    linearly from 0 in the first layer to `rate` in the last one, as in DeiT (Touvron et al. 2021).

    Args:
      key: of the draw.
      rate: of the last layer, below 1.
      num_layers: layers S; a single one has `rate`.
      shape: rows B, and documents M of a row.
    """
    rates = jnp.linspace(0.0, rate, num_layers) if num_layers > 1 else jnp.array([rate])
    kept = 1.0 - rates[:, None, None, None]
    is_kept = jax.random.bernoulli(key, kept, (num_layers, 2, *shape))
    return jnp.where(is_kept, 1.0 / kept, 0.0)


def scale_documents(
    x: Float[Array, "B L D"],
    scales: Float32[Array, "B M"],
    segment_ids: Int32[Array, "B L"] | None,
) -> Float[Array, "B L D"]:
    """Multiplies the tokens of every document by its factor."""

    def scale(x: Array, scales: Array, segment_ids: Array | None) -> Array:
        return x * at_tokens(scales[..., None].astype(x.dtype), segment_ids)

    features = partition_spec("batch", "length", "channels")
    return shard_map_logical(
        scale,
        in_specs=(
            features,
            partition_spec("batch", None),
            None if segment_ids is None else partition_spec("batch", "length"),
        ),
        out_specs=features,
    )(x, scales, segment_ids)
