"""Context parallelism: the sequence axis of every row is sharded over devices.

For use inside `jax.shard_map`, where every device holds one sequence shard: consecutive tokens of
its rows. A recurrence along the sequence (CEMA's state, TimestepNorm's moments) takes three steps:

    1. every device summarizes its own shard, starting from the empty state;
    2. one all-gather exchanges the small summaries;
    3. every device folds the summaries of the shards before its own (an exclusive scan).

No device waits for the outputs of another one.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.common.residuals import name_residuals


class LocalDocuments(NamedTuple):
    """The documents of one sequence shard.

    Attributes:
      first: segment id of the first token that is not padding; 0 if there is none.
      last: segment id of the last such token; 0 if there is none.
      num_tokens: tokens of the last document in this shard.
    """

    first: Int32[Array, " B"]
    last: Int32[Array, " B"]
    num_tokens: Int32[Array, " B"]


def local_documents(
    segment_ids: Int32[Array, "B L"] | None, num_rows: int, length: int
) -> LocalDocuments:
    """The documents of this device's shard; without segment ids one document fills it."""
    if segment_ids is None:
        one = jnp.ones(num_rows, jnp.int32)
        return LocalDocuments(one, one, length * one)
    # Segment ids increase along a row, apart from padding.
    last = segment_ids.max(axis=1)
    huge = jnp.iinfo(jnp.int32).max
    first = jnp.where(segment_ids == 0, huge, segment_ids).min(axis=1)
    num_tokens = jnp.sum((segment_ids == last[:, None]) & (segment_ids != 0), axis=1)
    return LocalDocuments(jnp.where(last == 0, 0, first), last, num_tokens.astype(jnp.int32))


def all_gather_summaries(
    documents: LocalDocuments, summary: Any, axis: str
) -> tuple[LocalDocuments, Any]:
    """Documents and summaries of all shards, with a new leading axis S, by one all-gather.

    Args:
      documents: of this device's shard.
      summary: tree of float32 arrays (B, ...).
      axis: name of the mesh axis.
    """
    leaves, structure = jax.tree.flatten(summary)
    num_rows = documents.first.shape[0]
    dtype = jnp.result_type(jnp.float32, *leaves)
    numbers = jnp.stack(documents, axis=1).astype(jnp.int32)
    # float32 holds integers below 2^24 exactly; larger ones travel as two halves.
    halves = jnp.concatenate([numbers >> 12, numbers & 0xFFF], axis=1).astype(dtype)
    flat = [jax.lax.stop_gradient(halves), *(leaf.reshape(num_rows, -1) for leaf in leaves)]
    gathered = _all_gather(jnp.concatenate(flat, axis=1), axis)
    gathered = name_residuals(gathered, "context_parallel")
    halves = gathered[..., :6].astype(jnp.int32)
    numbers = (halves[..., :3] << 12) | halves[..., 3:]
    ends = [6]
    for leaf in leaves:
        ends.append(ends[-1] + leaf.size // num_rows)
    pieces = [
        gathered[..., start:end].reshape(-1, *leaf.shape)
        for leaf, start, end in zip(leaves, ends, ends[1:], strict=False)
    ]
    return LocalDocuments(*jnp.moveaxis(numbers, -1, 0)), jax.tree.unflatten(structure, pieces)


def exclusive_fold(
    documents: LocalDocuments,
    summaries: Any,
    empty_state: Any,
    combine: Callable[[Any, Any, int], Any],
    axis: str,
) -> Any:
    """The state of this shard's first document before its first token here.

    Args:
      documents: of all shards, leading axis S.
      summaries: of the last document of every shard, as if it had begun there; leading axis S.
      empty_state: the state of a document before its first token, tree of (B, ...) arrays.
      combine: (state before a shard, summary of the shard, index of the shard) to the state after
        it, for a document that runs through the whole shard.
      axis: name of the mesh axis.
    """
    first, last, _ = documents
    state, current_document = empty_state, first[0]
    previous_states = []
    for i in range(first.shape[0]):
        continues = first[i] == current_document
        before = _select(continues, state, empty_state)
        previous_states.append(before)
        runs_through = (first[i] == last[i]) & continues
        summary = jax.tree.map(lambda leaf, i=i: leaf[i], summaries)
        after = combine(_select(runs_through, before, empty_state), summary, i)
        is_padding = last[i] == 0
        state = _select(is_padding, state, after)
        current_document = jnp.where(is_padding, current_document, last[i])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *previous_states)
    return jax.tree.map(lambda leaf: leaf[jax.lax.axis_index(axis)], stacked)


def exclusive_fold_vjp(
    fold: Callable[[Any], Any], summaries: Any, d_incoming: Any, axis: str
) -> Any:
    """Gradients of this shard's summary, from the gradients of every shard's incoming state.

    The transpose of all-gather and fold: one reduce-scatter.

    Args:
      fold: the summaries of all shards, a tree of (S, B, ...) arrays, to this shard's incoming
        state; an `exclusive_fold`.
      summaries: where `fold` is differentiated.
      d_incoming: cotangent of this shard's incoming state.
      axis: name of the mesh axis.
    """
    (d_summaries,) = jax.vjp(fold, summaries)[1](d_incoming)
    leaves, structure = jax.tree.flatten(d_summaries)
    flat = jnp.concatenate([leaf.reshape(*leaf.shape[:2], -1) for leaf in leaves], axis=2)
    own = _reduce_scatter(flat, axis)
    ends = list(itertools.accumulate(leaf[0, 0].size for leaf in leaves))
    pieces = jnp.split(own, ends[:-1], axis=1)
    own_leaves = [piece.reshape(leaf.shape[1:]) for piece, leaf in zip(pieces, leaves, strict=True)]
    return jax.tree.unflatten(structure, own_leaves)


def tokens_before_shard(segment_ids: Int32[Array, "B L"], axis: str) -> Int32[Array, " B"]:
    """Tokens that each row's first document here has in the shards before this device's."""
    num_rows, length = segment_ids.shape
    local = local_documents(segment_ids, num_rows, length)
    documents, _ = all_gather_summaries(local, (), axis)

    def combine(before: Array, summary: Any, index: int) -> Array:
        del summary
        return before + documents.num_tokens[index]

    return exclusive_fold(documents, (), jnp.zeros(num_rows, jnp.int32), combine, axis)


# XLA for GPUs combines gathers, and scatters, along the same dimension. The small ones here, for
# which a device waits, must not wait for those of weights, along dimension 0 or 1. So they
# run along dimension 2 of an array without dimensions of size 1, which XLA would drop.


def _all_gather(x: Array, axis: str) -> Array:
    """x of all devices, stacked along a new leading axis."""
    flat = jnp.pad(x.reshape(-1), (0, -x.size % 4)).reshape(2, 2, -1)
    gathered = jnp.moveaxis(jax.lax.all_gather(flat, axis, axis=2), 2, 0)
    return gathered.reshape(gathered.shape[0], -1)[:, : x.size].reshape(-1, *x.shape)


def _reduce_scatter(x: Array, axis: str) -> Array:
    """The sum over devices of the element of x's leading axis that has this device's number."""
    size = x[0].size
    flat = jnp.pad(x.reshape(x.shape[0], -1), ((0, 0), (0, -size % 4)))
    flat = jnp.moveaxis(flat.reshape(x.shape[0], 2, 2, -1), 0, 2)
    own = jax.lax.psum_scatter(flat, axis, scatter_dimension=2)
    return own.reshape(-1)[:size].reshape(x.shape[1:])


def _select(where: Array, yes: Any, no: Any) -> Any:
    def select(a: Array, b: Array) -> Array:
        return jnp.where(where.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(select, yes, no)
