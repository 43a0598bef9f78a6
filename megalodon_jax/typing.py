"""Names of dimensions, used in every shape of the project.

B batch, L length, K chunks, C chunk size, D model, Z query/key, E value, H heads, N orders of CEMA,
G norm groups, F feed-forward hidden, V vocabulary.
"""

from typing import Literal, NamedTuple

import jax
from jaxtyping import Array, Bool, Complex64, Float, Float32, Int, Int8, Int32, Shaped

PRNGKey = jax.Array


class Batch(NamedTuple):
    """Rows of packed documents, ready for a training step (numpy on the host, jax on devices).

    Attributes:
      tokens: input tokens; for encoders of images and sound values, float32 (B, L, c).
      targets: the token that follows each input token in its document; anything at weight 0. For
        classification the class of an example, at its last token.
      segment_ids: documents of a row numbered 1, 2, ... in order; 0 is padding. With
        `data.carry_state` document 1 continues the last one of the same row of the batch before,
        and a row that starts with a new document is numbered from 2.
      weights: 1.0 where the loss counts, 0.0 at padding and where no next token is known.
    """

    tokens: Int32[Array, "B L"]
    targets: Int32[Array, "B L"]
    segment_ids: Int32[Array, "B L"]
    weights: Float32[Array, "B L"]


class CountedBatch(NamedTuple):
    """A batch, and the text bytes that its weighted targets encode.

    Attributes:
      batch: all rows of the global batch, or those of one process.
      num_bytes: UTF-8 bytes of the global batch; None: not known.
    """

    batch: Batch
    num_bytes: int | None


__all__ = [
    "Array", "Batch", "Bool", "Complex64", "CountedBatch", "Float", "Float32", "Int", "Int8",
    "Int32", "Literal", "PRNGKey", "Shaped",
]  # fmt: skip
