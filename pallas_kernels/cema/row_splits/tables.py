"""Inputs of CEMA's GPU kernels beside the sequences: coefficients, document boundaries.

Made in plain JAX before the kernels run. The kernels keep states divided by p.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, Int32

from pallas_kernels.cema import coefficients
from pallas_kernels.cema.row_splits.types import CHANNELS, TILE
from pallas_kernels.cema.types import CemaParams

# Orders of one launch: the state of more does not fit into registers. Further orders are further
# launches, whose outputs are summed.
MAX_ORDERS_PER_LAUNCH = 16
# States are divided by p; a smaller p changes h by less than 2^-40 of x.
_SMALLEST_INPUT_WEIGHT = 2.0**-40


class CemaTables(NamedTuple):
    """Coefficients of one launch.

    Attributes:
      coefficients: real and imaginary part of q, of c = p gamma / √N, and of q^split.
      omega: weight of the direct path.
      damping: the least 1 - |q| of every block of channels.
    """

    coefficients: Float[Array, "6 N D"]
    omega: Float[Array, " D"]
    damping: Float[Array, " blocks"]


class CemaDocuments(NamedTuple):
    """Document boundaries of packed rows.

    Attributes:
      boundary_bits: for every tile, the tokens that start a document, and the padding tokens, as
        bits. The row's first document starts only after left padding.
      row_ends: the row's first and last token that is not padding; -1 for a row of padding.
      passes_state_through: 1 if no document starts in the split.
    """

    boundary_bits: Int32[Array, "B tiles 2"]
    row_ends: Int32[Array, "B 2"]
    passes_state_through: Int32[Array, "B S"]


class CemaOperands(NamedTuple):
    """Inputs of the kernels beside the sequences; fields are None when unused.

    Attributes:
      tables: `CemaTables`.
      documents: `CemaDocuments`.
      initial: the state before every row; backward the adjoint state e after every row, which only
        the row's last split uses.
      summaries: the state that every split adds, without the row's last split; backward without
        its first.
      previous_states: the state before every split.
    """

    tables: Any
    documents: Any = None
    initial: Any = None
    summaries: Any = None
    previous_states: Any = None


class CemaCoefficients(NamedTuple):
    """q and gamma / √N by their real and imaginary parts, p and omega."""

    q_real: Float[Array, "D N"]
    q_imag: Float[Array, "D N"]
    gamma_real: Float[Array, "D N"]
    gamma_imag: Float[Array, "D N"]
    p: Float[Array, "D N"]
    omega: Float[Array, " D"]

    @property
    def q(self) -> Complex[Array, "D N"]:
        """The decay as complex numbers."""
        return jax.lax.complex(self.q_real, self.q_imag)

    @property
    def gamma(self) -> Complex[Array, "D N"]:
        """The output weight as complex numbers."""
        return jax.lax.complex(self.gamma_real, self.gamma_imag)


def state_scale(params: CemaParams) -> Float[Array, "D N"]:
    """p, by which the kernels divide states."""
    return jnp.maximum(coefficients.input_weight(params), _SMALLEST_INPUT_WEIGHT)


def find_coefficients(params: CemaParams) -> CemaCoefficients:
    """The coefficients that the kernels' gradients refer to."""
    q = coefficients.powers(params, jnp.ones(1, jnp.int32))[..., 0]
    gamma = coefficients.output_weight(params)
    p = state_scale(params)
    return CemaCoefficients(q.real, q.imag, gamma.real, gamma.imag, p, params.omega)


def order_groups(order: int) -> list[slice]:
    """The orders of every launch; y is a sum over orders, omega belongs to the first launch."""
    starts = range(0, order, MAX_ORDERS_PER_LAUNCH)
    return [slice(start, min(start + MAX_ORDERS_PER_LAUNCH, order)) for start in starts]


def make_tables(params: CemaParams, split_size: int) -> list[CemaTables]:
    """The tables of every launch, for splits of `split_size` tokens."""
    groups = order_groups(params.alpha.shape[1])
    q = coefficients.powers(params, jnp.asarray([1, split_size], jnp.int32))
    c = state_scale(params) * coefficients.output_weight(params)
    # Stacked before they are transposed: one small kernel instead of six.
    parts = [part for z in (q[..., 0], c, q[..., 1]) for part in (z.real, z.imag)]
    rows = jnp.swapaxes(jnp.stack(parts), 1, 2)
    damping = coefficients.damping(params).reshape(-1, CHANNELS * params.alpha.shape[1]).min(1)
    omegas = [params.omega] + [jnp.zeros_like(params.omega)] * (len(groups) - 1)
    return [
        CemaTables(rows[:, group], omega, damping)
        for group, omega in zip(groups, omegas, strict=True)
    ]


def find_documents(segment_ids: Int32[Array, "B L"], split_size: int) -> CemaDocuments:
    """The boundaries of packed rows, for splits of `split_size` tokens."""
    rows, length = segment_ids.shape
    position = jnp.arange(length, dtype=jnp.int32)
    is_token = segment_ids != 0
    first = jnp.where(is_token, position, length).min(axis=1)
    last = jnp.where(is_token, position, -1).max(axis=1)
    previous_ids = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
    is_row_start = position == 0
    starts = is_token & (segment_ids != previous_ids) & ~is_row_start
    bit_values = jnp.left_shift(jnp.int32(1), jnp.arange(TILE, dtype=jnp.int32))

    def to_bits(flags: Array) -> Array:
        return (flags.reshape(rows, -1, TILE) * bit_values).sum(-1, dtype=jnp.int32)

    padded = jnp.pad(starts, ((0, 0), (0, -length % split_size)))
    return CemaDocuments(
        boundary_bits=jnp.stack([to_bits(starts), to_bits(~is_token)], axis=-1),
        row_ends=jnp.stack([jnp.where(last < 0, -1, first), last], axis=-1),
        passes_state_through=(~padded.reshape(rows, -1, split_size).any(-1)).astype(jnp.int32),
    )
