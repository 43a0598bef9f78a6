"""Coefficients of the recurrence, and tables of a block of it, from CEMA's parameters.

    p = sigmoid(alpha),  q = (1 - sigmoid(alpha) sigmoid(delta)) exp(i n sigmoid(theta) 2π / N)

Everything is differentiable by autodiff; results are small (D, N)-sized tables, never sequences.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, Int

from pallas_kernels.cema.phase import cos_sin_of_multiples
from pallas_kernels.cema.types import CemaParams

# sigmoid(alpha) sigmoid(delta) rounds to 1 for large logits, and q^0 = exp(0 · log 0) would be NaN.
_LARGEST_DAMPING = 1 - 2.0**-24


class BlockTables(NamedTuple):
    """CEMA over a block of T tokens as small real tables; 2N is [real parts | imaginary parts].

    Attributes:
      taps: Re Σ_n gamma p q^τ for lags τ < T, plus omega at τ = 0.
      to_state: p q^(T-1-t): projects tokens to the state after the block.
      from_state: gamma q^(t+1), real part and negated imaginary part: projects the state before
        the block to y[t].
      decay: q^T.
      decay_levels: q^(T F^i) for i = 0, 1, ..., F the fan-in of the scan over blocks; no gradient.
    """

    taps: Float[Array, "T D"]
    to_state: Float[Array, "D T 2N"]
    from_state: Float[Array, "D 2N T"]
    decay: Float[Array, "D 2N"]
    decay_levels: tuple[Float[Array, "D 2N"], ...]


def input_weight(params: CemaParams) -> Float[Array, "D N"]:
    """The weight p = sigmoid(alpha) of the input."""
    return jax.nn.sigmoid(params.alpha)


def output_weight(params: CemaParams) -> Complex[Array, "D N"]:
    """The weight gamma / √N of the state, as a complex number."""
    scale = 1 / math.sqrt(params.alpha.shape[-1])
    return jax.lax.complex(params.gamma[..., 0] * scale, params.gamma[..., 1] * scale)


def damping(params: CemaParams) -> Float[Array, "D N"]:
    """1 - |q|."""
    product = jax.nn.sigmoid(params.alpha) * jax.nn.sigmoid(params.delta)
    return jnp.minimum(product, _LARGEST_DAMPING)


def powers(params: CemaParams, exponents: Int[Array, " T"]) -> Complex[Array, "D N T"]:
    """q^t for integers t >= 0.

    log|q| = log1p(-sigmoid(alpha) sigmoid(delta)) preserves the distance of |q| from 1, and the
    angle is reduced exactly (`phase`): the error is near 1e-6 even if t is 10^5 tokens.
    """
    order = params.alpha.shape[-1]
    damped = damping(params)[..., None]
    scaled = jnp.log1p(-damped) * exponents.astype(damped.dtype)
    # A recurrence applies |q| at every token: for t = 1, avoid the rounding error of exp.
    modulus = jnp.where(exponents == 1, 1 - damped, jnp.exp(scaled))
    multiples = jnp.arange(1, order + 1, dtype=jnp.int32)[:, None] * exponents.astype(jnp.int32)
    cos, sin = cos_sin_of_multiples(params.theta, multiples, order)
    return jax.lax.complex(modulus * cos, modulus * sin)


def block_tables(
    params: CemaParams, block_size: int, level_exponents: tuple[int, ...]
) -> tuple[BlockTables, Complex[Array, "D N T+1"]]:
    """Tables of blocks of `block_size` tokens, and q^t for t = 0..T.

    Args:
      params: CEMA's parameters.
      block_size: T.
      level_exponents: exponents of q in `decay_levels`.
    """
    exponents = [*range(block_size + 1), *level_exponents]
    # Without the barrier XLA computes sines and cosines again for every table below.
    all_powers = jax.lax.optimization_barrier(powers(params, jnp.asarray(exponents, jnp.int32)))
    q, levels = jnp.split(all_powers, [block_size + 1], axis=-1)
    levels = jax.lax.stop_gradient(levels)
    p = input_weight(params)[..., None]
    gamma = output_weight(params)[..., None]
    taps = jnp.sum((gamma * p * q[..., :-1]).real, axis=1).T
    to_state = jnp.moveaxis(p * q[..., block_size - 1 :: -1], 1, 2)
    from_state = gamma * q[..., 1:]
    tables = BlockTables(
        taps=taps.at[0].add(params.omega),
        to_state=pack(to_state),
        from_state=jnp.concatenate([from_state.real, -from_state.imag], axis=1),
        decay=pack(q[..., -1]),
        decay_levels=tuple(pack(levels[..., i]) for i in range(len(level_exponents))),
    )
    return tables, q


def pack(z: Complex[Array, "*S N"]) -> Float[Array, "*S 2N"]:
    """[real parts | imaginary parts] along the last axis."""
    return jnp.concatenate([z.real, z.imag], axis=-1)


def unpack(a: Float[Array, "*S 2N"]) -> Complex[Array, "*S N"]:
    """The inverse of `pack`."""
    half = a.shape[-1] // 2
    return jax.lax.complex(a[..., :half], a[..., half:])
