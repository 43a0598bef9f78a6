"""Where the tokens of a call stand in their documents and chunks."""

from functools import partial
from typing import NamedTuple

import jax
from jax import numpy as jnp
from jax.typing import DTypeLike

from megalodon_jax.modules.documents import document_lengths
from megalodon_jax.modules.precision import at_least_float32
from megalodon_jax.modules.rotary import Rotation, rotation
from megalodon_jax.parallel.sharding import partition_spec, sequence_axis, shard_map_logical
from megalodon_jax.typing import Array, Int32
from pallas_kernels.common import context_parallel


class PositionInfo(NamedTuple):
    """Positions and documents of the tokens of a call, for every layer.

    Attributes:
      rotation: rotary angles of every token's position in its chunk; None: no position embedding.
      positions: position of every token in its document; None: 0..L-1 in every row.
        Non-causal attention takes None with segment ids too: chunks begin with the row.
      segment_ids: document of every token, 0 for padding; None: a row is one document.
      lengths: tokens of every document, M at most in a row, for SequenceNorm; None: not counted.
    """

    rotation: Rotation | None
    positions: Int32[Array, "B L"] | None
    segment_ids: Int32[Array, "B L"] | None
    lengths: Int32[Array, "B M"] | None = None


def position_info(
    shape: tuple[int, int],
    *,
    chunk_size: int | None,
    head_dim: int,
    rope_base: float | None,
    segment_ids: Int32[Array, "B L"] | None = None,
    start: Int32[Array, " B"] | None = None,
    max_documents: int | None = None,
    aligned: bool = False,
    dtype: DTypeLike = jnp.float32,
) -> PositionInfo:
    """Positions of the tokens of a call, and their rotary angles.

    Args:
      shape: rows B and tokens L.
      chunk_size: tokens C of an attention chunk; angles begin anew in every chunk. None: no chunks.
      head_dim: width of a query or key head.
      rope_base: base of the rotary angles; None: no position embedding.
      segment_ids: documents of each row, numbered from 1; 0 is padding.
      start: tokens that the row's first document has had before this call; None: none, ever.
      max_documents: most documents of a row, to count their tokens; None: they are not counted.
      aligned: documents begin at multiples of C in their rows, so that chunks begin with the row;
        only for non-causal attention, which then needs no positions.
      dtype: of the model; angles are float32, float64 for float64.
    """
    positions = document_positions(shape, segment_ids, start)
    in_document = jnp.arange(shape[1])[None] if positions is None else positions
    in_chunk = in_document if chunk_size is None else in_document % chunk_size
    angles = None
    if rope_base is not None:
        angles = rotation(in_chunk, head_dim, rope_base, at_least_float32(dtype))
    lengths = None
    if segment_ids is not None and max_documents is not None:
        lengths = document_lengths(segment_ids, max_documents)
    return PositionInfo(angles, None if aligned else positions, segment_ids, lengths)


def document_positions(
    shape: tuple[int, int],
    segment_ids: Int32[Array, "B L"] | None,
    start: Int32[Array, " B"] | None,
) -> Int32[Array, "B L"] | None:
    """Position of every token in its document; None where that is the column index in every row.

    Arguments as for `position_info`.
    """
    if segment_ids is None:
        if start is None:
            return None
        return start[:, None] + jnp.arange(shape[1], dtype=jnp.int32)

    def find(segment_ids: Array, start: Array) -> Array:
        columns = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
        is_border = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
        first_column = jax.lax.cummax(jnp.where(is_border, columns, 0), axis=1)
        if (axis := sequence_axis()) is not None:
            start = context_parallel.tokens_before_shard(segment_ids, axis)
        return columns - first_column + jnp.where(first_column == 0, start[:, None], 0)

    tokens = partition_spec("batch", "length")
    start = jnp.zeros(shape[0], jnp.int32) if start is None else start
    return shard_map_logical(find, in_specs=(tokens, partition_spec("batch")), out_specs=tokens)(
        segment_ids, start
    )


def after_last_token(
    info: PositionInfo, position: Int32[Array, " B"], segment: Int32[Array, " B"]
) -> tuple[Int32[Array, " B"], Int32[Array, " B"]]:
    """Each row's position and segment id after its last token that is not padding.

    Args:
      info: of a call with a cache.
      position: tokens that the row's document had before the call.
      segment: segment id before the call.
    """
    positions, segment_ids = info.positions, info.segment_ids
    assert positions is not None
    if segment_ids is None:
        return positions[:, -1] + 1, jnp.maximum(segment, 1)
    columns = jnp.arange(segment_ids.shape[1])
    last = jnp.max(jnp.where(segment_ids != 0, columns, -1), axis=1)
    at_last = partial(jnp.take_along_axis, indices=jnp.maximum(last, 0)[:, None], axis=1)
    has_tokens = last >= 0
    return (
        jnp.where(has_tokens, at_last(positions)[:, 0] + 1, position),
        jnp.where(has_tokens, at_last(segment_ids)[:, 0], segment),
    )
