"""The new token in a block: its query and key from the shared representation, 8-bit rounding."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.chunk_decode.mosaic_gpu.layouts import token_layout
from pallas_kernels.chunk_decode.types import SharedRepresentation
from pallas_kernels.common.int8 import round_to_levels, scale_for


class QueryAndKey(NamedTuple):
    """Finished queries and keys (B, H, Dk), bfloat16."""

    q: Any
    k: Any


def load_query_and_key(source: QueryAndKey | SharedRepresentation, row: Any, head: Any) -> Any:
    """The query and the key of a token as float32 numbers that bfloat16 holds.

    Args:
      source: references of all tokens.
      row: of the token.
      head: of the token.
    """
    if isinstance(source, QueryAndKey):
        return tuple(_load(ref, row, head).astype(jnp.float32) for ref in source)
    return tuple(
        projected.astype(jnp.bfloat16).astype(jnp.float32)
        for projected in _project(source, row, head)
    )


def _project(shared: SharedRepresentation, row: Any, head: Any) -> list[Any]:
    """`SharedRepresentation.queries_and_keys` of one head."""
    # All loads come before the sum over threads: they wait for memory once.
    z = _load(shared.z, row, head)
    scale, offset, other_scale, other_offset = (
        [] if unused else [_load(vector, which, head) for which in (0, 1)]
        for vector, unused in zip(
            shared.vectors, (False, False, *[shared.rotation is None] * 2), strict=True
        )
    )
    swapped_z, rotation = None, None
    if shared.rotation is not None:
        swapped_z = _load(shared.swapped_z, row, head)
        rotation = [_load(factors, row, 0) for factors in shared.rotation]
    if shared.eps is None:
        z, swapped_z = jax.nn.silu(z), None if swapped_z is None else jax.nn.silu(swapped_z)
    else:
        factor = lax.rsqrt(jnp.sum(z * z) / z.size + shared.eps)
        z, swapped_z = z * factor, None if swapped_z is None else swapped_z * factor
    results = [z * scale[which] + offset[which] for which in (0, 1)]
    if rotation is None or swapped_z is None:
        return results
    own, other = rotation
    return [
        result * own + (swapped_z * other_scale[which] + other_offset[which]) * other
        for which, result in enumerate(results)
    ]


def _load(ref: Any, *index: Any) -> Any:
    return plgpu.load(ref.at[index], layout=token_layout(ref.shape[-1]), optimized=False)


class RoundedToken(NamedTuple):
    """A vector in the cache's format, as float32.

    Attributes:
      levels: the numbers, whole ones in a cache of 8-bit integers.
      scale: their factor; None without integers.
    """

    levels: Any
    scale: Any

    @classmethod
    def of(cls, x: Any, row: Any) -> "RoundedToken":
        """Rounds x as `common.int8.quantize` does.

        Args:
          x: some columns of a vector.
          row: the whole vector, whose largest magnitude counts, in any layout.
        """
        scale = scale_for(jnp.max(jnp.abs(row)))
        return cls(round_to_levels(x, scale), scale)
