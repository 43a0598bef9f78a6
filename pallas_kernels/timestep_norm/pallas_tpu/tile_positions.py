"""Positions of tokens in their documents, as the TPU kernels read them."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.timestep_norm.pallas_tpu.block_sizes import SUBLANES
from pallas_kernels.timestep_norm.pallas_tpu.layout import TimestepNormTpuPlan
from pallas_kernels.timestep_norm.positions import document_positions, token_counts

# Rows of `position_rows`.
COUNT, INITIAL_COUNT, FIRST_INDEX, LAST_INDEX, FLAGS = range(5)
# Bits of the row FLAGS.
VALID, DOCUMENT_START, LATER_DOCUMENT, FINAL_TOKEN = 1, 2, 4, 8


def position_rows(
    plan: TimestepNormTpuPlan,
    num_rows: int,
    initial_count: Int32[Array, " B"],
    prior_count: Int32[Array, ""],
    segment_ids: Int32[Array, "B L"] | None,
) -> Int32[Array, "B 8 L"]:
    """Five integers for every token, in the first rows of a register.

    COUNT: tokens in the state after this one. INITIAL_COUNT: tokens in the state before the
    document's first token. FIRST_INDEX: index of that token. LAST_INDEX: index before the next
    document's first token. FLAGS: VALID unless it is padding, DOCUMENT_START at a document's first
    token, LATER_DOCUMENT in all documents but a row's first, FINAL_TOKEN at a row's last token.
    """
    length = plan.padded_length
    index = jnp.arange(length, dtype=jnp.int32)
    if segment_ids is None:
        flags = VALID * (index < plan.length) + DOCUMENT_START * (index == 0)
        flags += FINAL_TOKEN * (index == plan.length - 1)
        rows = {
            COUNT: initial_count[:, None] + jnp.minimum(index + 1, plan.length),
            INITIAL_COUNT: initial_count[:, None],
            FIRST_INDEX: 0,
            LAST_INDEX: length - 1,
            FLAGS: flags,
        }
    else:
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, length - plan.length)))
        documents = document_positions(segment_ids)
        count, initial = token_counts(documents, initial_count, prior_count)
        tokens = jnp.cumsum(documents.valid, axis=1, dtype=jnp.int32)
        is_final_token = documents.valid & (tokens == tokens[:, -1:])
        rows = {
            COUNT: count,
            INITIAL_COUNT: initial,
            FIRST_INDEX: documents.first_index,
            LAST_INDEX: documents.last_index,
            FLAGS: VALID * documents.valid
            + DOCUMENT_START * documents.is_first_token
            + LATER_DOCUMENT * documents.in_later_document
            + FINAL_TOKEN * is_final_token,
        }
    shape = (num_rows, length)
    stacked = jnp.stack([jnp.broadcast_to(jnp.int32(row), shape) for row in rows.values()], axis=1)
    return jnp.pad(stacked, ((0, 0), (0, SUBLANES - len(rows)), (0, 0)))


def zero_padding(
    plan: TimestepNormTpuPlan, positions: Any, lanes: Any, values: Float[Array, "C T"]
) -> Float[Array, "C T"]:
    """Zero at positions without a token."""
    if not plan.may_have_padding:
        return values
    flags = jnp.broadcast_to(positions[FLAGS : FLAGS + 1, lanes], values.shape)
    return jnp.where((flags & VALID) != 0, values, 0)


class TilePositions(NamedTuple):
    """Positions of a tile's tokens, repeated for every row of group statistics: (R, T).

    Attributes:
      count: tokens in the state after this one, at least 1.
      initial_count: tokens in the state before the document's first token.
      flags: see `position_rows`.
      lane: index in the tile.
      from_start: lanes back to the document's first token, or to the tile's first lane.
      to_end: lanes to the document's end, or to the tile's last lane.
      starts_before_tile: whether the token's document starts in an earlier tile.
      ends_after_tile: whether it continues in a later tile.
    """

    count: Float[Array, "R T"]
    initial_count: Float[Array, "R T"]
    flags: Int32[Array, "R T"]
    lane: Int32[Array, "R T"]
    from_start: Int32[Array, "R T"]
    to_end: Int32[Array, "R T"]
    starts_before_tile: Bool[Array, "R T"]
    ends_after_tile: Bool[Array, "R T"]

    @classmethod
    def load(cls, plan: TimestepNormTpuPlan, positions: Any, tile_index: Array) -> "TilePositions":
        """Loads the positions of one tile of a row."""
        tokens = plan.blocks.tokens
        shape = (plan.group_rows, tokens)
        row = [jnp.broadcast_to(positions[i : i + 1, :], shape) for i in range(FLAGS + 1)]
        lane = lax.broadcasted_iota(jnp.int32, shape, 1)
        first = row[FIRST_INDEX] - tile_index * tokens
        last = row[LAST_INDEX] - tile_index * tokens
        return cls(
            count=jnp.maximum(row[COUNT], 1).astype(jnp.float32),
            initial_count=row[INITIAL_COUNT].astype(jnp.float32),
            flags=row[FLAGS],
            lane=lane,
            from_start=lane - jnp.maximum(first, 0),
            to_end=jnp.minimum(last, tokens - 1) - lane,
            starts_before_tile=first < 0,
            ends_after_tile=last >= tokens,
        )

    def has(self, flag: int) -> Bool[Array, "R T"]:
        """Where a flag is set."""
        return (self.flags & flag) != 0

    def running_sums(self, values: Float[Array, "R T"], *, reverse: bool = False) -> Array:
        """Inclusive sums along each document inside the tile, by doubling steps.

        Other documents' values are selected away, so that their infinities do not spread.
        """
        tokens = values.shape[1]
        reach = self.to_end if reverse else self.from_start
        distance = 1
        while distance < tokens:
            shifted = pltpu.roll(values, tokens - distance if reverse else distance, 1)
            values = values + jnp.where(reach >= distance, shifted, 0)
            distance *= 2
        return values
