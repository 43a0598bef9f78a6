"""Top-k and top-p filters without a sort.

Tokens are ordered by logit (descending), then by id (ascending); a filter keeps the first ones. The
smallest logit that it keeps is found by a radix search, four bits of the order-preserving integer
of a float32 at a time: each pass counts, or sums the weights of, the tokens from 15 candidates on.
Sums are taken over integers, so that they do not depend on the order of the additions: a filter
keeps the same tokens in every program, batch size and sharding. The cost is linear in the
vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import UInt32

from megalodon_jax.typing import Array, Bool, Float32, Int32

_RADIX_BITS = 4
_KEY_BITS = 32


class _Cut(NamedTuple):
    """The first tokens of the order.

    Attributes:
      key: of the last one; tokens of a larger key are kept.
      ties: number of kept tokens of this key, those of the lowest ids.
    """

    key: UInt32[Array, " B"]
    ties: Int32[Array, " B"]


class _FixedPoint(NamedTuple):
    """Integers as two limbs, whose sums over the vocabulary fit 32 bits.

    Attributes:
      high: upper limb.
      low: lower limb.
    """

    high: UInt32[Array, "*s"]
    low: UInt32[Array, "*s"]


def filter_mask(
    logits: Float32[Array, "B V"],
    *,
    k: Int32[Array, " B"] | None = None,
    p: Float32[Array, " B"] | None = None,
    weights: Float32[Array, "B V"] | None = None,
) -> Bool[Array, "B V"]:
    """The tokens that top-k, and top-p of what top-k leaves, keep; ties prefer lower ids.

    Top-k keeps exactly min(k, V) tokens, so that k = 1 is greedy decoding even with ties. Top-p
    (Holtzman et al. 2019) keeps the smallest set whose probability reaches p, at least one token.

    Args:
      logits: the order of the tokens; not NaN.
      k: number of tokens, 0: all; None: no top-k.
      p: share of the probability in (0, 1], 1: all; None: no top-p.
      weights: probabilities up to a factor, for p: 0 to 1, and 1 for the largest logit. They are
        rounded to multiples of 2^-30 (2^-2b with b = 32 - log2 V for a V above 2^17).
    """
    keys = ordered_keys(logits)
    everything = jnp.zeros(len(keys), jnp.uint32), jnp.full(len(keys), keys.shape[1], jnp.int32)
    cut = _Cut(*everything)
    if k is not None:
        cut = _cut_top_k(keys, k)
    if p is not None:
        assert weights is not None
        cut = _cut_top_p(keys, weights, p, cut)
    is_tie = keys == cut.key[:, None]
    kept_tie = is_tie & (jnp.cumsum(is_tie, axis=-1, dtype=jnp.int32) <= cut.ties[:, None])
    return (keys > cut.key[:, None]) | kept_tie


def _cut_top_k(keys: UInt32[Array, "B V"], k: Int32[Array, " B"]) -> _Cut:
    V = keys.shape[1]
    wanted = jnp.where(k == 0, V, jnp.minimum(k, V)).astype(jnp.uint32)

    def reaches(candidates: UInt32[Array, "B n"]) -> Bool[Array, "B n"]:
        (counts,) = _sums_from(keys, candidates, [jnp.ones_like(keys)])
        return counts >= wanted[:, None]

    last = _radix_search(_KEY_BITS, len(keys), reaches)
    above = jnp.sum(keys > last[:, None], axis=-1, dtype=jnp.uint32)
    return _Cut(last, (wanted - above).astype(jnp.int32))


def _cut_top_p(
    keys: UInt32[Array, "B V"], weights: Float32[Array, "B V"], p: Float32[Array, " B"], cut: _Cut
) -> _Cut:
    """The cut of the nucleus within an earlier cut."""
    B, V = keys.shape
    # The sum of V upper limbs fits 32 bits.
    bits = min(15, 32 - (V - 1).bit_length())
    fixed = jnp.round(weights * float(1 << 2 * bits)).astype(jnp.uint32)
    fixed = jnp.minimum(fixed, jnp.uint32((1 << 2 * bits) - 1))
    limbs = _FixedPoint(fixed >> bits, fixed & ((1 << bits) - 1))

    target = p[:, None] * _mass_to(keys, limbs, cut.key, bits)(cut.ties[:, None].astype(jnp.uint32))

    def reaches(candidates: UInt32[Array, "B n"]) -> Bool[Array, "B n"]:
        mass = _as_float(_FixedPoint(*_sums_from(keys, candidates, limbs)), bits)
        return (mass >= target) | (candidates <= cut.key[:, None])

    last = _radix_search(_KEY_BITS, B, reaches)
    num_ties = jnp.sum(keys == last[:, None], axis=-1, dtype=jnp.int32)
    limit = jnp.where(last == cut.key, cut.ties, num_ties).astype(jnp.uint32)[:, None]
    mass = _mass_to(keys, limbs, last, bits)
    # The largest number of ties that does not reach p, and one more.
    short = _radix_search(V.bit_length(), B, lambda n: (n < limit) & (mass(n) < target))
    ends_all = p >= 1.0
    return _Cut(
        jnp.where(ends_all, cut.key, last),
        jnp.where(ends_all, cut.ties, short.astype(jnp.int32) + 1),
    )


def _mass_to(
    keys: UInt32[Array, "B V"], limbs: _FixedPoint, key: UInt32[Array, " B"], bits: int
) -> Callable[[UInt32[Array, "B n"]], Float32[Array, "B n"]]:
    """The weight of all tokens above a key and of n that have it, as a function of n."""
    above, tie = keys > key[:, None], keys == key[:, None]
    sums = [jnp.sum(jnp.where(above, x, 0), axis=-1, dtype=jnp.uint32)[:, None] for x in limbs]
    each = [jnp.max(jnp.where(tie, x, 0), axis=-1)[:, None] for x in limbs]

    def mass(ties: UInt32[Array, "B n"]) -> Float32[Array, "B n"]:
        return _as_float(
            _FixedPoint(*(total + ties * one for total, one in zip(sums, each, strict=True))), bits
        )

    return mass


def _as_float(x: _FixedPoint, bits: int) -> Float32[Array, "*s"]:
    """A float32 that is monotone in the integer.

    The first term is exact, or the second is smaller than half the unit of the first. A fused
    multiply-add gives the same, because the product is a power of two.
    """
    high = x.high + (x.low >> bits)
    low = x.low & ((1 << bits) - 1)
    return high.astype(jnp.float32) * float(1 << bits) + low.astype(jnp.float32)


def _sums_from(
    keys: UInt32[Array, "B V"],
    candidates: UInt32[Array, "B n"],
    values: Sequence[UInt32[Array, "B V"]],
) -> list[UInt32[Array, "B n"]]:
    """Sums of values over the tokens whose key is at least a candidate.

    One reduction with several results reads the keys once: on a CPU ten times as fast as a sum
    over an array (B, n, V).
    """
    n = candidates.shape[1]
    operands = [
        jnp.where(keys >= candidates[:, j, None], value, 0) for value in values for j in range(n)
    ]
    sums = jax.lax.reduce(
        tuple(operands),
        (jnp.uint32(0),) * len(operands),
        lambda left, right: tuple(a + b for a, b in zip(left, right, strict=True)),
        (1,),
    )
    return [jnp.stack(sums[i : i + n], axis=1) for i in range(0, len(operands), n)]


def _radix_search(
    bits: int, batch: int, holds: Callable[[UInt32[Array, "B n"]], Bool[Array, "B n"]]
) -> UInt32[Array, " B"]:
    """The largest integer of so many bits up to which a condition holds; 0 if for no other."""
    passes = -(-bits // _RADIX_BITS)
    digits = jnp.arange(1, 1 << _RADIX_BITS, dtype=jnp.uint32)

    def run_pass(i: int | Array, found: UInt32[Array, " B"]) -> UInt32[Array, " B"]:
        shift = jnp.uint32(_RADIX_BITS * (passes - 1 - i))
        digit = jnp.sum(holds(found[:, None] | (digits << shift)), axis=-1, dtype=jnp.uint32)
        return found | (digit << shift)

    def run(unroll: bool) -> UInt32[Array, " B"]:
        start = jnp.zeros(batch, jnp.uint32)
        return jax.lax.fori_loop(0, passes, run_pass, start, unroll=unroll)

    # XLA does not put loops into CUDA graphs; on a CPU a loop compiles several times as fast.
    return jax.lax.platform_dependent(cpu=lambda: run(False), default=lambda: run(True))


def ordered_keys(x: Float32[Array, "*s"]) -> UInt32[Array, "*s"]:
    """Unsigned integers in the order of the floats; -0 equals +0."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0.0, 0.0, x), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits & sign, ~bits, bits | sign)
