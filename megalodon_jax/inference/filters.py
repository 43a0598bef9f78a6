"""Top-k, top-p and min-p filters without a sort.

Tokens are ordered by logit (descending), then by id (ascending). The last token that a filter keeps
is found by a radix search, four bits of the order-preserving integer of a float32 at a time: each
pass counts, or sums the weights of, the tokens above 15 candidates. Sums are taken over integers,
so that their value does not depend on the order of the additions: a filter keeps the same tokens
in every program, batch size and sharding. The cost is linear in the vocabulary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import UInt32

from megalodon_jax.typing import Array, Bool, Float32, Int32

_RADIX_BITS = 4
_KEY_BITS = 32
# Reduces a mask (B, 15, V) to the quantity of a filter and compares it: (B, 15).
_Reaches = Callable[[Bool[Array, "B n V"]], Bool[Array, "B n"]]


def top_k_mask(logits: Float32[Array, "B V"], k: Int32[Array, " B"]) -> Bool[Array, "B V"]:
    """The k largest logits of each row; ties prefer lower ids; k = 0: all.

    Exactly min(k, V) tokens are kept, so that k = 1 is greedy decoding even with ties.
    """
    V = logits.shape[-1]
    wanted = jnp.where(k == 0, V, jnp.minimum(k, V))

    def reaches(inside: Bool[Array, "B n V"]) -> Bool[Array, "B n"]:
        return jnp.sum(inside, axis=-1, dtype=jnp.int32) >= wanted[:, None]

    return _largest_that_reach(logits, reaches)


def top_p_mask(
    logits: Float32[Array, "B V"], weights: Float32[Array, "B V"], p: Float32[Array, " B"]
) -> Bool[Array, "B V"]:
    """The nucleus: the smallest set of largest logits whose weight reaches p of the total.

    Holtzman et al. 2019. It has at least one token; ties prefer lower ids; p = 1: all tokens.

    Args:
      logits: the order of the tokens.
      weights: their probabilities, up to a factor: 0 to 1, and 1 for the largest logit. They are
        rounded to multiples of 2^-30 (2^-2b, b = 32 - log2 V, for a V above 2^17).
      p: share of the total weight, in (0, 1].
    """
    limb_bits = min(15, 32 - (logits.shape[-1] - 1).bit_length())
    largest = (1 << 2 * limb_bits) - 1
    fixed = jnp.round(weights * float(1 << 2 * limb_bits)).astype(jnp.uint32)
    fixed = jnp.minimum(fixed, jnp.uint32(largest))
    high, low = fixed >> limb_bits, fixed & ((1 << limb_bits) - 1)

    def mass(inside: Bool[Array, "B n V"]) -> Float32[Array, "B n"]:
        sums = [
            jnp.sum(jnp.where(inside, limb[:, None], 0), axis=-1, dtype=jnp.uint32)
            for limb in (high, low)
        ]
        carried = sums[0] + (sums[1] >> limb_bits)
        remainder = sums[1] & ((1 << limb_bits) - 1)
        # Monotone in the exact sum: either the first term is exact or its unit exceeds the second.
        return carried.astype(jnp.float32) * float(1 << limb_bits) + remainder.astype(jnp.float32)

    target = p[:, None] * mass(jnp.ones_like(logits, bool)[:, None])
    nucleus = _largest_that_reach(logits, lambda inside: mass(inside) >= target)
    # Weights that round to zero are outside any nucleus but part of the whole distribution.
    return nucleus | (p >= 1.0)[:, None]


def _largest_that_reach(logits: Float32[Array, "B V"], reaches: _Reaches) -> Bool[Array, "B V"]:
    """The smallest set of largest logits for which a monotone condition holds."""
    V = logits.shape[-1]
    keys = ordered_keys(logits)[:, None]
    # Greater for lower ids.
    ranks = jnp.arange(V - 1, -1, -1, dtype=jnp.uint32)
    last = _radix_search(_KEY_BITS, logits.shape[0], lambda c: reaches(keys >= c[..., None]))
    last = last[:, None, None]
    above, equal = keys > last, keys == last
    rank = _radix_search(
        max((V - 1).bit_length(), 1),
        logits.shape[0],
        lambda c: reaches(above | (equal & (ranks >= c[..., None]))),
    )
    return (above | (equal & (ranks >= rank[:, None, None])))[:, 0]


def _radix_search(
    bits: int,
    batch: int,
    holds: Callable[[UInt32[Array, "B n"]], Bool[Array, "B n"]],
) -> UInt32[Array, " B"]:
    """The largest integer of so many bits for which a condition holds that holds below it."""
    found = jnp.zeros(batch, jnp.uint32)
    for shift in reversed(range(0, bits, _RADIX_BITS)):
        digits = jnp.arange(1, 1 << min(_RADIX_BITS, bits - shift), dtype=jnp.uint32)
        candidates = found[:, None] | (digits << shift)
        digit = jnp.sum(holds(candidates), axis=-1, dtype=jnp.uint32)
        found = found | (digit << shift)
    return found


def ordered_keys(x: Float32[Array, "*s"]) -> UInt32[Array, "*s"]:
    """Unsigned integers in the order of the floats; -0 equals +0."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0.0, 0.0, x), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits & sign, ~bits, bits | sign)
