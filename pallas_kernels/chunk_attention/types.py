"""Arguments and results of chunk attention, and small functions that implementations share.

B batch, L length, C chunk size, H heads, Dk width of a query/key head, Dv width of a value head.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int8, Int32

from pallas_kernels.common.int8 import quantize

DropoutMode = Literal["softmax", "dropkey"]


class Int8Slots(NamedTuple):
    """Keys or values as 8-bit integers with a scale for every token and head: x ≈ values * scale.

    Attributes:
      values: D numbers of a token's head.
      scale: their common factor.
    """

    values: Int8[Array, "B H C D"]
    scale: Float32[Array, "B H C"]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values."""
        return self.values.shape

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the values."""
        return self.values.dtype


Slots = Float[Array, "B H C D"] | Int8Slots


class KeyValueCache(NamedTuple):
    """Keys and values of a row's current chunk; slot j holds the chunk's token j.

    Slots at or after the row's position modulo C are empty: their contents are ignored.

    Attributes:
      key: keys after RoPE, (B, H, C, Dk): an array or `Int8Slots`.
      value: values, (B, H, C, Dv), of the same kind.
    """

    # Not `Slots`: most functions take arrays alone, and would have to check it.
    key: Any
    value: Any

    @property
    def is_quantized(self) -> bool:
        """Whether keys and values are 8-bit integers."""
        return isinstance(self.key, Int8Slots)

    def encode(
        self, k: Float[Array, "*tokens Dk"], v: Float[Array, "*tokens Dv"]
    ) -> "KeyValueCache":
        """Keys and values of tokens in this cache's format."""
        if not self.is_quantized:
            return KeyValueCache(k, v)
        return KeyValueCache(Int8Slots(*quantize(k)), Int8Slots(*quantize(v)))

    def decode(self, key_dtype: jnp.dtype, value_dtype: jnp.dtype) -> "KeyValueCache":
        """The cache with numbers of these dtypes where it has 8-bit integers."""
        return KeyValueCache(_decode(self.key, key_dtype), _decode(self.value, value_dtype))

    def swap_heads_and_slots(self) -> "KeyValueCache":
        """(B, H, C, d) to (B, C, H, d), the order of tokens in a row, and back."""
        return jax.tree.map(lambda slots: slots.swapaxes(1, 2), self)


def _decode(slots: Slots, dtype: jnp.dtype) -> Array:
    if not isinstance(slots, Int8Slots):
        return slots
    return (slots.values * slots.scale[..., None]).astype(dtype)


def check_scales(name: str, slots: Slots, is_quantized: bool) -> None:
    """Raises ValueError if slots are not `Int8Slots` where they should be, or their scales wrong.

    Args:
      name: of the slots, for the message.
      slots: keys or values.
      is_quantized: whether the cache's keys are `Int8Slots`.
    """
    if isinstance(slots, Int8Slots) != is_quantized:
        raise ValueError(f"{name} differs from the keys: both are Int8Slots, or neither is")
    if not isinstance(slots, Int8Slots):
        return
    scale, expected = slots.scale, slots.shape[:3]
    if scale.shape != expected or scale.dtype != jnp.float32:
        raise ValueError(
            f"{name}.scale is {scale.dtype}{scale.shape}; expected float32{expected}: one for "
            "every token and head"
        )


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
