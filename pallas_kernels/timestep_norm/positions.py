"""Where every token of packed rows stands in its document."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32


class DocumentPositions(NamedTuple):
    """Positions of tokens; padding behind a document's first token counts as part of the document.

    Attributes:
      valid: False at padding.
      is_first_token: True at the first token of every document.
      in_later_document: True in all documents but a row's first.
      first_index: index of the document's first token.
      last_index: index before the next document's first token, or the row's last index.
    """

    valid: Bool[Array, "B L"]
    is_first_token: Bool[Array, "B L"]
    in_later_document: Bool[Array, "B L"]
    first_index: Int32[Array, "B L"]
    last_index: Int32[Array, "B L"]


def document_positions(segment_ids: Int32[Array, "B L"]) -> DocumentPositions:
    """Positions in rows whose documents are numbered 1, 2, ... in order; 0 is padding."""
    length = segment_ids.shape[1]
    is_first_token = document_starts(segment_ids)
    index = jnp.arange(length, dtype=jnp.int32)
    is_last_index = jnp.pad(is_first_token[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    return DocumentPositions(
        valid=segment_ids != 0,
        is_first_token=is_first_token,
        in_later_document=jnp.cumsum(is_first_token, axis=1) > 1,
        first_index=jax.lax.cummax(jnp.where(is_first_token, index, 0), axis=1),
        last_index=jax.lax.cummin(
            jnp.where(is_last_index, index, length - 1), axis=1, reverse=True
        ),
    )


def token_counts(
    documents: DocumentPositions,
    initial_count: Int32[Array, " B"],
    prior_count: Int32[Array, ""],
) -> tuple[Int32[Array, "B L"], Int32[Array, "B L"]]:
    """Tokens in the state after every token, and in the state that its document starts from.

    Args:
      documents: positions of the tokens.
      initial_count: tokens in the state that a row's first document starts from.
      prior_count: tokens in the prior, from which all other documents start.
    """
    tokens = jnp.cumsum(documents.valid, axis=1, dtype=jnp.int32)
    tokens_before_document = jax.lax.cummax(
        jnp.where(documents.is_first_token, tokens - 1, 0), axis=1
    )
    initial = jnp.where(documents.in_later_document, prior_count, initial_count[:, None])
    return initial + tokens - tokens_before_document, initial


def document_starts(segment_ids: Int32[Array, "B L"]) -> Bool[Array, "B L"]:
    """True at the first token of every document; padding in a document does not start a new one."""
    # Ids increase along a row, so the largest one before a token is the last one before it.
    largest = jax.lax.cummax(segment_ids, axis=1)
    before = jnp.pad(largest[:, :-1], ((0, 0), (1, 0)))
    return (segment_ids != 0) & (segment_ids != before)
