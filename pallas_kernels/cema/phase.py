"""Angles of powers of q, exact over hundreds of thousands of tokens, in float32 and int32 alone.

The angle of q is n sigmoid(theta) / N of a revolution per token. In plain float32 the distance in
tokens multiplies the rounding error of that number: at |q| = 1 - 1e-5 this alone gives a relative
error of 1e-3. Here the fraction of a revolution is a 32-bit fixed-point integer and a float32
remainder, together some 44 bits. Multiples of the integer wrap modulo 2^32, which is modulo one
revolution, so the reduction of the angle is free and exact.

The sigmoid is computed on unevaluated pairs hi + lo of float32. Every `hi` passes through
`lax.reduce_precision` to 23 bits, and every product that must be exact has factors of 12 bits.
Neither fused multiply-adds nor algebraic rewriting by a compiler can therefore change the result.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

# ln 2 in three numbers, two of 15 bits, whose products with an exponent below 2^8 are exact.
_LN2_HIGH = math.floor(math.log(2) * 2**15) / 2**15
_LN2_MIDDLE = math.floor((math.log(2) - _LN2_HIGH) * 2**30) / 2**30
_LN2_LOW = math.log(2) - _LN2_HIGH - _LN2_MIDDLE
# Taylor series of exp(-r), |r| < 0.35: terms below this one in pairs, the rest in float32 (9e-8 of
# the sum).
_FIRST_FLOAT32_TERM = 7
_TERMS = 14
# For larger logits sigmoid is 0 or 1 to 2^-92, far below the precision of the pairs.
_LARGEST_LOGIT = 64.0


class _Pair(NamedTuple):
    hi: Array
    lo: Array


@jax.custom_jvp
def _cos_sin(theta: Array, multiples: Array, order: Array) -> tuple[Array, Array]:
    frequency = _sigmoid_over(theta, order)  # revolutions per token
    # The integer below is signed: above 1/2 subtract a revolution. Exact (Sterbenz).
    centred = jnp.where(frequency.hi >= 0.5, frequency.hi - 1.0, frequency.hi)
    units = jnp.floor(centred * 2.0**32)
    remainder = (centred * 2.0**32 - units) + frequency.lo * 2.0**32
    carry = jnp.round(remainder)
    fixed = units.astype(jnp.int32) + carry.astype(jnp.int32)
    fraction = (remainder - carry) * 2.0**-32
    shape = theta.shape + (1,) * multiples.ndim
    wrapped = multiples * fixed.reshape(shape)
    # Reduced to an eighth of a revolution, the angle in float32 has all its bits.
    quarters = (wrapped + 2**29) >> 30
    wrapped = (wrapped - (quarters << 30)).astype(jnp.float32) * 2.0**-32
    remainder = multiples.astype(jnp.float32) * fraction.reshape(shape)
    angle = (wrapped + remainder) * (2 * math.pi)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    is_odd = (quarters & 1) == 1
    cos, sin = jnp.where(is_odd, sin, cos), jnp.where(is_odd, cos, sin)
    cos = jnp.where(((quarters + 1) & 2) == 2, -cos, cos)
    return cos, jnp.where((quarters & 2) == 2, -sin, sin)


@_cos_sin.defjvp
def _cos_sin_jvp(primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    theta, multiples, order = primals
    slope = jax.nn.sigmoid(theta) * jax.nn.sigmoid(-theta) * (2 * math.pi / order) * tangents[0]
    tangent = slope.reshape(theta.shape + (1,) * multiples.ndim) * multiples.astype(theta.dtype)
    cos, sin = _cos_sin(theta, multiples, order)
    return (cos, sin), (-sin * tangent, cos * tangent)


def cos_sin_of_multiples(
    theta: Float[Array, " D"], multiples: Int[Array, "..."], order: int
) -> tuple[Float[Array, "D ..."], Float[Array, "D ..."]]:
    """Cosine and sine of the angle m · sigmoid(theta) · 2π / N, for integers m = n · t.

    Args:
      theta: logits, float32 or float64.
      multiples: int32 numbers m of any shape; a product n · t that wraps around int32 is correct.
      order: N.

    Returns:
      In theta's dtype. The error in float32 is at most 2e-7 for |m| up to 2^20 and 1e-6 up to
      2^22. The derivative in theta is that of the unreduced angle.
    """
    if theta.dtype == jnp.float64:
        base = jax.nn.sigmoid(theta) * (2 * math.pi / order)
        angle = base.reshape(theta.shape + (1,) * multiples.ndim) * multiples.astype(jnp.float64)
        return jnp.cos(angle), jnp.sin(angle)
    return _cos_sin(theta, multiples.astype(jnp.int32), jnp.float32(order))


def _sigmoid_over(theta: Array, order: Array) -> _Pair:
    small = _exp_of_negative(jnp.minimum(jnp.abs(theta), _LARGEST_LOGIT))
    one = _Pair(jnp.ones_like(theta), jnp.zeros_like(theta))
    numerator = jax.tree.map(lambda a, b: jnp.where(theta >= 0, a, b), one, small)
    order_pair = _Pair(jnp.broadcast_to(order, theta.shape), jnp.zeros_like(theta))
    return _divide(numerator, _multiply(_add(one, small), order_pair))


def _exp_of_negative(a: Array) -> _Pair:
    k = jnp.round(a * (1 / math.log(2)))
    remainder = a - k * _LN2_HIGH
    hi = _round(remainder - k * _LN2_MIDDLE)
    lo = ((remainder - hi) - k * _LN2_MIDDLE) - k * _LN2_LOW
    z = _Pair(-hi, -lo)
    tail = jnp.zeros_like(a)
    for term in range(_TERMS - 1, _FIRST_FLOAT32_TERM - 1, -1):
        tail = tail * z.hi + 1 / math.factorial(term)
    total = _Pair(_round(tail), jnp.zeros_like(a))
    for term in range(_FIRST_FLOAT32_TERM - 1, -1, -1):
        total = _add(_constant(1 / math.factorial(term)), _multiply(total, z))
    # 2^-k by its bit pattern: exp2 is not exact on every platform.
    scale = lax.bitcast_convert_type((127 - k.astype(jnp.int32)) << 23, jnp.float32)
    return _Pair(total.hi * scale, total.lo * scale)


def _constant(value: float) -> _Pair:
    hi = np.ldexp(np.round(np.ldexp(value, 22)), -22)  # at most 23 bits for values up to 1
    return _Pair(jnp.float32(hi), jnp.float32(value - hi))


def _round(a: Array) -> Array:
    return lax.reduce_precision(a, exponent_bits=8, mantissa_bits=22)


def _split(a: Array) -> tuple[Array, Array]:
    top = lax.reduce_precision(a, exponent_bits=8, mantissa_bits=11)
    return top, a - top


def _add(a: _Pair, b: _Pair) -> _Pair:
    """The sum for |a| >= |b|."""
    hi = _round(a.hi + b.hi)
    return _Pair(hi, ((a.hi - hi) + b.hi) + (a.lo + b.lo))


def _multiply(a: _Pair, b: _Pair) -> _Pair:
    hi = _round(a.hi * b.hi)
    a_top, a_low = _split(a.hi)
    b_top, b_low = _split(b.hi)
    error = (((a_top * b_top - hi) + a_top * b_low) + a_low * b_top) + a_low * b_low
    return _Pair(hi, error + (a.hi * b.lo + a.lo * b.hi))


def _divide(a: _Pair, b: _Pair) -> _Pair:
    hi = _round(a.hi / b.hi)
    product = _multiply(_Pair(hi, jnp.zeros_like(hi)), b)
    return _Pair(hi, ((a.hi - product.hi) + (a.lo - product.lo)) / b.hi)
