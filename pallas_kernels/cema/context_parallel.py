"""CEMA over a sequence that is split over devices."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, Int32

from pallas_kernels.cema.coefficients import pack, powers, unpack
from pallas_kernels.cema.types import CemaOutput, CemaParams
from pallas_kernels.common import context_parallel


class Links(NamedTuple):
    """How states pass from part to part.

    Attributes:
      parts: documents of all parts, leading axis S.
      decays: q^tokens, what every part leaves of the state before it, packed.
    """

    parts: context_parallel.LocalDocuments
    decays: Float[Array, "S B D 2N"]


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
    part = context_parallel.local_documents(segment_ids, *x.shape[:2])
    return run(enter(summarize(), part, params, axis)[0])


def enter(
    own: Complex[Array, "B D N"],
    part: context_parallel.LocalDocuments,
    params: CemaParams,
    axis: str,
) -> tuple[Complex[Array, "B D N"], Links]:
    """The state before this device's tokens, from what every device finds of its own alone.

    Args:
      own: the state after this device's last document, as if it had begun here.
      part: this device's documents.
      params: CEMA's parameters.
      axis: mesh axis over which the sequence is split.
    """
    parts, summaries = context_parallel.all_gather_summaries(part, pack(own), axis)
    # For every part and row.
    exponents = parts.num_tokens.reshape(-1)
    decays = jnp.moveaxis(powers(params, exponents), -1, 0)
    links = Links(parts, pack(decays).reshape(*parts.num_tokens.shape, *decays.shape[1:-1], -1))
    return _fold(summaries, links, axis), links


def enter_backward(e: Complex[Array, "B D N"], links: Links, axis: str) -> Complex[Array, "B D N"]:
    """The transpose of `enter`: from every device's e at its first token to e after its last.

    One reduce-scatter, the mirror of the gather.
    """

    def through(own: Complex[Array, "B D N"]) -> Complex[Array, "B D N"]:
        return _fold(jax.lax.all_gather(pack(own), axis), links, axis)

    return jax.linear_transpose(through, e)(e)[0]


def _fold(summaries: Float[Array, "S B D 2N"], links: Links, axis: str) -> Complex[Array, "B D N"]:
    def append(before: Array, summary: Array, number: int) -> Array:
        return unpack(links.decays[number]) * before + unpack(summary)

    fresh = jnp.zeros_like(unpack(summaries[0]))
    return context_parallel.exclusive_fold(links.parts, summaries, fresh, append, axis)
