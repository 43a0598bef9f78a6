"""Arguments and results of chunk attention, and small functions that implementations share.

B batch, L length, C chunk size, H heads, Dk width of a query/key head, Dv width of a value head.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

DropoutMode = Literal["softmax", "dropkey"]


class KeyValueCache(NamedTuple):
    """Keys and values of a row's current chunk; slot j holds the chunk's token j.

    Slots at or after the row's position modulo C are empty: their contents are ignored.

    Attributes:
      key: keys after RoPE.
      value: values.
    """

    key: Float[Array, "B H C Dk"]
    value: Float[Array, "B H C Dv"]

    def swap_heads_and_slots(self) -> "KeyValueCache":
        """(B, H, C, d) to (B, C, H, d), the order of tokens in a row, and back."""
        return KeyValueCache(self.key.swapaxes(1, 2), self.value.swapaxes(1, 2))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionDropout:
    """Dropout inside attention; the mask is a function of key, shapes and implementation.

    Attributes:
      rate: dropped fraction, in [0, 1).
      key: PRNG key.
      mode: `softmax` zeroes weights after the softmax and divides the others by 1 - rate; `dropkey`
        removes keys from the softmax (scores of -inf) without rescaling. `dropkey` never drops a
        token's own key, so that every softmax has at least one key.
    """

    rate: float = dataclasses.field(metadata={"static": True})
    key: jax.Array
    mode: DropoutMode = dataclasses.field(default="softmax", metadata={"static": True})


class ChunkAttentionOutput(NamedTuple):
    """Result of `chunk_attention`.

    Attributes:
      out: weighted values, 0 at padding, dtype of v.
      cache: the current chunk after the row's last token that is not padding; None without an
        incoming cache.
    """

    out: Float[Array, "B L H Dv"]
    cache: KeyValueCache | None


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Dtype of scores and sums: float32, or float64 for float64 operands."""
    return jnp.promote_types(dtype, jnp.float32)


def matmul_precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """Full precision for float32 and float64 operands: no TF32 and no bfloat16 passes."""
    if dtype in (jnp.float32, jnp.float64):
        return jax.lax.Precision.HIGHEST
    return jax.lax.Precision.DEFAULT


def dropout_masks(
    dropout: AttentionDropout, shape: tuple[int, ...], own: Bool[Array, "..."]
) -> tuple[Bool[Array, "..."] | None, Float[Array, "..."] | None]:
    """Draws a dropout mask: (keys in the softmax, factor on the weights), one of which is None.

    Args:
      dropout: rate, key and mode.
      shape: shape of the scores.
      own: True where the key is the query's own token; broadcasts to `shape`.
    """
    keep_mask = jax.random.bernoulli(dropout.key, 1.0 - dropout.rate, shape)
    if dropout.mode == "dropkey":
        return keep_mask | own, None
    return None, jnp.where(keep_mask, 1.0 / (1.0 - dropout.rate), 0.0)


def last_token(
    positions: Int32[Array, "B L"], segment_ids: Int32[Array, "B L"] | None
) -> tuple[Int32[Array, " B"], Int32[Array, " B"]]:
    """Index and position of each row's last token that is not padding; both -1 without one."""
    B, L = positions.shape
    if segment_ids is None:
        return jnp.full((B,), L - 1, jnp.int32), positions[:, -1]
    index = jnp.arange(L, dtype=jnp.int32)
    last = jnp.max(jnp.where(segment_ids != 0, index, -1), axis=1)
    position = jnp.max(jnp.where(index == last[:, None], positions, -1), axis=1)
    return last, position
