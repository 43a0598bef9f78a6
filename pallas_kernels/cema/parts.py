"""CEMA over a sequence that is split over devices."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import sequence_parts
from pallas_kernels.cema.coefficients import pack, powers, unpack
from pallas_kernels.cema.types import CemaOutput, CemaParams


def cema_of_part(
    x: Float[Array, "B L D"],
    params: CemaParams,
    segment_ids: Int32[Array, "B L"] | None,
    axis: str,
    summarize: Callable[[], Array],
    run: Callable[[Array], CemaOutput],
) -> CemaOutput:
    """Outputs of this device's tokens, the sequence going on from part to part along `axis`.

    The state after the part is that of the tokens so far, so the last device's is the row's.

    Args:
      x: this device's tokens.
      params: CEMA's parameters.
      segment_ids: documents, numbered along whole rows.
      axis: mesh axis over which the sequence is split.
      summarize: the state after this part of a document that begins with it, or in it.
      run: CEMA of this part from a state.
    """
    rows, length, channels = x.shape
    part = sequence_parts.describe(segment_ids, rows, length)
    parts, summaries = sequence_parts.gather(part, pack(summarize()), axis)
    # q^tokens for every part and row: what a part leaves of the state before it.
    exponents = parts.tokens.reshape(-1)
    decays = jnp.moveaxis(powers(params, exponents), -1, 0).reshape(
        *parts.tokens.shape, channels, -1
    )

    def append(before: Array, summary: Array, number: int) -> Array:
        return decays[number] * before + unpack(summary)

    fresh = jnp.zeros_like(decays[0])
    return run(sequence_parts.fold(parts, summaries, fresh, append, axis))
