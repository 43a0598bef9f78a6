"""CEMA's block tables in the layout of the TPU kernels, differentiable by autodiff."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Complex, Float

from pallas_kernels.cema import coefficients
from pallas_kernels.cema.pallas_tpu_layout import BLOCK, HALF, padded_order, to_lanes
from pallas_kernels.cema.types import CemaParams

# q^t = q^(16 a) q^b: 24 sines and cosines a channel and order, not 128.
_FINE = 16


class TpuTables(NamedTuple):
    """`coefficients.BlockTables` for T = 128 with the lanes of `to_lanes`, G groups of channels.

    Attributes:
      taps: Re Σ_n gamma p q^τ, plus omega at τ = 0.
      to_state: p q^(T-1-t).
      from_state: gamma q^(t+1), imaginary part negated.
      decay: q^T.
    """

    taps: Float[Array, "D T"]
    to_state: Float[Array, "G 128 T"]
    from_state: Float[Array, "G 128 T"]
    decay: Float[Array, "G 128"]


def build_tables(params: CemaParams) -> TpuTables:
    """Tables of all channels; D is a multiple of 128."""
    exponents = [*range(1, _FINE), *range(_FINE, BLOCK + 1, _FINE)]
    # Without the barrier every table below computes its own sines and cosines.
    powers = lax.optimization_barrier(
        coefficients.powers(params, jnp.asarray(exponents, jnp.int32))
    )
    one = jnp.ones_like(powers[..., :1])
    fine = jnp.concatenate([one, powers[..., : _FINE - 1]], axis=-1)
    coarse = jnp.concatenate([one, powers[..., _FINE - 1 : -1]], axis=-1)
    p = coefficients.input_weight(params)[..., None]
    gamma = coefficients.output_weight(params)[..., None]
    taps = jnp.sum(_outer(p * gamma * coarse, fine).real, axis=1)
    to_state = _outer(p * coarse[..., ::-1], fine[..., ::-1])
    from_state = jnp.conj(_outer(gamma * powers[..., :1] * coarse, fine))
    return TpuTables(
        taps=taps.at[:, 0].add(params.omega),
        to_state=_group(to_state),
        from_state=_group(from_state),
        decay=to_lanes(powers[..., -1], padded_order(params.alpha.shape[1])),
    )


def _outer(coarse: Complex[Array, "D N A"], fine: Complex[Array, "D N F"]) -> Array:
    products = coarse[..., None] * fine[..., None, :]
    return products.reshape(*products.shape[:2], BLOCK)


def _group(z: Complex[Array, "D N T"]) -> Float[Array, "G 128 T"]:
    order = z.shape[1]
    padded = jnp.pad(z, ((0, 0), (0, padded_order(order) - order), (0, 0)))
    grouped = padded.reshape(-1, HALF, BLOCK)
    return jnp.concatenate([grouped.real, grouped.imag], axis=1)
