"""Rows of a call: token counts, documents, and which splits exchange states."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from pallas_kernels.timestep_norm.positions import (
    DocumentPositions,
    document_positions,
    token_counts,
)
from pallas_kernels.timestep_norm.row_splits.types import (
    COUNT,
    DOCUMENT_START,
    FEEDS_NEXT_SPLIT,
    FEEDS_PREVIOUS_SPLIT,
    FLAGS,
    LATER_DOCUMENT,
    TILE,
    VALID,
    TimestepNormDocuments,
    TimestepNormGeometry,
    TimestepNormGpuOptions,
)
from pallas_kernels.timestep_norm.types import MeanVar


class SplitConnectivity(NamedTuple):
    """Which splits of packed rows share a document; S splits, J of them summarized (S - 1).

    Attributes:
      feeds_forward: split j belongs to the document that split s - 1 ends in.
      continues_later: that document is not the row's first.
      feeds_backward: split j > s begins in the document that split s ends in; last column: the row
        ends in it.
      begins_in_first: split s begins in the row's first document; last column: the row ends in it.
      ends_in_last: split s ends in the row's last document.
    """

    feeds_forward: Bool[Array, "B S J"]
    continues_later: Bool[Array, "B S"]
    feeds_backward: Bool[Array, "B S J+1"]
    begins_in_first: Bool[Array, "B S+1"]
    ends_in_last: Bool[Array, "B S"]


class RowInfo(NamedTuple):
    """Counts and documents of the rows; the last three are None in rows without documents.

    Attributes:
      initial_count: tokens before the row.
      prior_count: tokens in the prior, before every other document.
      final_count: tokens in the state after the row.
      token_info: see `TimestepNormDocuments`.
      has_tokens: False in rows of padding alone.
      connectivity: which splits share a document.
    """

    initial_count: Int32[Array, " B"]
    prior_count: Int32[Array, ""]
    final_count: Int32[Array, " B"]
    token_info: Int32[Array, "B tiles 4 128"] | None
    has_tokens: Bool[Array, " B"] | None
    connectivity: SplitConnectivity | None


def describe_rows(
    options: TimestepNormGpuOptions,
    initial_count: Int32[Array, " B"],
    prior_count: Int32[Array, ""],
    segment_ids: Int32[Array, "B L"] | None,
    length: int,
) -> RowInfo:
    """Counts and documents of rows of `length` tokens, without the padding of the last tile."""
    if segment_ids is None:
        return RowInfo(initial_count, prior_count, initial_count + length, None, None, None)
    token_info = options.kernels.token_info(options, segment_ids, initial_count, prior_count)
    return RowInfo(
        initial_count,
        prior_count,
        token_info[:, -1, COUNT, -1],
        token_info,
        (segment_ids != 0).any(axis=1),
        _connect_splits(options.geometry, document_positions(segment_ids)),
    )


def pack_token_info(
    options: TimestepNormGpuOptions,
    segment_ids: Int32[Array, "B L"],
    initial_count: Int32[Array, " B"],
    prior_count: Int32[Array, ""],
) -> Int32[Array, "B tiles 4 128"]:
    """`TimestepNormDocuments.token_info`."""
    documents = document_positions(segment_ids)
    count, _ = token_counts(documents, initial_count, prior_count)
    rows, length = count.shape
    split = options.geometry.tiles_per_split * TILE
    index = jnp.arange(length, dtype=jnp.int32)
    valid, starts, later, first, last = documents
    split_start = index // split * split
    flags = (
        valid * VALID
        + starts * DOCUMENT_START
        + later * LATER_DOCUMENT
        + (last >= jnp.minimum(split_start + split, length) - 1) * FEEDS_NEXT_SPLIT
        + ((first < split_start) | ~later) * FEEDS_PREVIOUS_SPLIT
    )
    # The slopes of the final state continue into the row's last document.
    to_end = last - index + (last == length - 1)
    info = jnp.stack([count, index - first, to_end, flags.astype(jnp.int32)], axis=1)
    return jnp.swapaxes(info.reshape(rows, 4, -1, TILE), 1, 2)


def _connect_splits(
    geometry: TimestepNormGeometry, documents: DocumentPositions
) -> SplitConnectivity:
    splits, split = geometry.splits, geometry.tiles_per_split * TILE
    first, later = documents.first_index, documents.in_later_document
    number = jnp.arange(splits, dtype=jnp.int32)
    # First index of the document that every split but the last ends in, and in which split it is.
    ends_in = first[:, split - 1 :: split][:, : splits - 1]
    document_split = jnp.pad(ends_in // split, ((0, 0), (1, 0)))
    # First index of the document that every split but the first begins in, and the row ends in.
    begins_in = jnp.concatenate([first[:, split::split], first[:, -1:]], axis=1)
    is_before = number[None, :-1] < number[:, None]
    return SplitConnectivity(
        feeds_forward=is_before & (number[:-1] >= document_split[:, :, None]),
        continues_later=jnp.pad(later[:, split - 1 :: split][:, : splits - 1], ((0, 0), (1, 0))),
        feeds_backward=begins_in[:, None, :] <= (number[:, None] + 1) * split - 1,
        begins_in_first=~jnp.concatenate([later[:, ::split], later[:, -1:]], axis=1),
        ends_in_last=number >= first[:, -1:] // split,
    )


def kernel_documents(
    row_info: RowInfo, initial: MeanVar, prior: MeanVar
) -> TimestepNormDocuments | None:
    """The kernels' operand for packed rows; None without documents.

    Args:
      row_info: from `describe_rows`.
      initial: mean and variance (B, G) that a row's first document starts from.
      prior: mean and variance (G,) that later documents start from.
    """
    if row_info.token_info is None:
        return None
    initial_count = row_info.initial_count
    counts = (initial_count, jnp.broadcast_to(row_info.prior_count, initial_count.shape))
    counts = jnp.stack(counts, axis=1)
    moments = [initial, tuple(jnp.broadcast_to(moment, initial[0].shape) for moment in prior)]
    columns = [
        column
        for j, (mean, var) in enumerate(moments)
        for column in (mean, counts[:, j : j + 1].astype(mean.dtype) * var)
    ]
    has_initial = (counts > 0).astype(jnp.int32)
    has_start = (row_info.token_info[:, :, FLAGS] & DOCUMENT_START).max(axis=-1)
    return TimestepNormDocuments(
        row_info.token_info, has_start, jnp.stack(columns, axis=-1), has_initial
    )
