"""A sequence split over devices: which documents go on from one part to the next.

For use inside `jax.shard_map`, where every device holds consecutive tokens of its rows. Whatever
runs along the sequence (CEMA's state, TimestepNorm's moments) is found in three steps: every device
sums up its own part, the small sums are gathered once, and every device folds those before it. None
waits for a neighbour.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.residuals import keep


class Part(NamedTuple):
    """Documents of one part of the rows.

    Attributes:
      first: segment id of the first token that is not padding; 0 if there is none.
      last: the same of the last token.
      tokens: tokens of the last document in this part.
    """

    first: Int32[Array, " B"]
    last: Int32[Array, " B"]
    tokens: Int32[Array, " B"]


def describe(segment_ids: Int32[Array, "B L"] | None, rows: int, length: int) -> Part:
    """The documents of this device's part; without segment ids one that fills it."""
    if segment_ids is None:
        one = jnp.ones(rows, jnp.int32)
        return Part(one, one, length * one)
    # Ids grow along a row, but for padding.
    last = segment_ids.max(axis=1)
    huge = jnp.iinfo(jnp.int32).max
    first = jnp.where(segment_ids == 0, huge, segment_ids).min(axis=1)
    tokens = jnp.sum((segment_ids == last[:, None]) & (segment_ids != 0), axis=1)
    return Part(jnp.where(last == 0, 0, first), last, tokens.astype(jnp.int32))


def gather(part: Part, summary: Any, axis: str) -> tuple[Part, Any]:
    """All devices' parts and summaries, with a new leading axis, in one collective.

    Args:
      part: of this device.
      summary: tree of float32 arrays (B, ...).
      axis: name of the mesh axis.
    """
    leaves, structure = jax.tree.flatten(summary)
    rows = part.first.shape[0]
    dtype = jnp.result_type(jnp.float32, *leaves)
    numbers = jnp.stack(part, axis=1).astype(jnp.int32)
    # Below 2^24 tokens and documents a float32 holds them exactly; larger ones go in two halves.
    halves = jnp.concatenate([numbers >> 12, numbers & 0xFFF], axis=1).astype(dtype)
    flat = [jax.lax.stop_gradient(halves), *(leaf.reshape(rows, -1) for leaf in leaves)]
    gathered = jax.lax.all_gather(jnp.concatenate(flat, axis=1), axis)
    gathered = keep(gathered, "sequence_parts")
    halves = gathered[..., :6].astype(jnp.int32)
    numbers = (halves[..., :3] << 12) | halves[..., 3:]
    ends = [6]
    for leaf in leaves:
        ends.append(ends[-1] + leaf.size // rows)
    pieces = [
        gathered[..., start:end].reshape(-1, *leaf.shape)
        for leaf, start, end in zip(leaves, ends, ends[1:], strict=False)
    ]
    return Part(*jnp.moveaxis(numbers, -1, 0)), jax.tree.unflatten(structure, pieces)


def fold(
    parts: Part,
    summaries: Any,
    fresh: Any,
    append: Callable[[Any, Any, Any], Any],
    axis: str,
) -> Any:
    """What this device's first document had before its first token here.

    Args:
      parts: of all devices, leading axis S.
      summaries: of the last document of every part, as if it had begun there; leading axis S.
      fresh: what a document begins with, tree of (B, ...) arrays.
      append: (what came before, summary of a part, the part's number) to what comes after it, for
        a document that goes on through the whole part.
      axis: name of the mesh axis.
    """
    first, last, _ = parts
    state, known = fresh, first[0]
    entering = []
    for i in range(first.shape[0]):
        goes_on = first[i] == known
        before = _select(goes_on, state, fresh)
        entering.append(before)
        whole = (first[i] == last[i]) & goes_on
        summary = jax.tree.map(lambda leaf, i=i: leaf[i], summaries)
        after = append(_select(whole, before, fresh), summary, i)
        is_padding = last[i] == 0
        state = _select(is_padding, state, after)
        known = jnp.where(is_padding, known, last[i])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *entering)
    return jax.tree.map(lambda leaf: leaf[jax.lax.axis_index(axis)], stacked)


def tokens_before(segment_ids: Int32[Array, "B L"], axis: str) -> Int32[Array, " B"]:
    """Tokens that each row's first document here has in the parts before this device's."""
    rows, length = segment_ids.shape
    parts, _ = gather(describe(segment_ids, rows, length), (), axis)

    def append(before: Array, summary: Any, number: int) -> Array:
        del summary
        return before + parts.tokens[number]

    return fold(parts, (), jnp.zeros(rows, jnp.int32), append, axis)


def _select(where: Array, yes: Any, no: Any) -> Any:
    def select(a: Array, b: Array) -> Array:
        return jnp.where(where.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(select, yes, no)
