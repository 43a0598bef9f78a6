"""CEMA's block tables for the TPU kernels: made, and their gradients reduced, inside the kernels.

XLA for TPU would spend several times the kernels' own time on these tables, in layouts padded to
128 lanes. In a kernel the powers of q for all times are some twenty multiplications of registers:
time on sublanes, orders on lanes, one factor q^(2^k) for each bit k of the time.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.cema import coefficients
from pallas_kernels.cema.pallas_tpu import layout
from pallas_kernels.cema.pallas_tpu.layout import (
    BLOCK,
    CHANNELS,
    HALF,
    LANES,
    SUBLANES,
    CemaTpuPlan,
)
from pallas_kernels.cema.types import CemaParams

_BITS = BLOCK.bit_length() - 1
# Rows of a group in `moments`: four of to_state, four of from_state, two of the taps and omega's.
MOMENTS = 16


class TableParams(NamedTuple):
    """All that the kernels need of the parameters, in the layout of `to_lanes`.

    Every table is scale · q^t. Scales: p for to_state, whose time runs backward; gamma q for
    from_state, whose imaginary part is negated; gamma p for the taps, the real part summed over
    orders.

    Attributes:
      to_state: p.
      from_state: gamma q.
      taps: gamma p.
      q: q.
      omega: added to the tap of lag 0.
      decay: q^T.
      factors: q, q^2, q^4, ... q^64 and a row of 0; their gradient goes to `q`.
      tile_decays: q^tokens for the tokens of a forward and of a backward tile; no gradient.
    """

    to_state: Float[Array, "G 128"]
    from_state: Float[Array, "G 128"]
    taps: Float[Array, "G 128"]
    q: Float[Array, "G 128"]
    omega: Float[Array, " D"]
    decay: Float[Array, "G 128"]
    factors: Float[Array, "G 8 128"]
    tile_decays: Float[Array, "2 G 128"]


class TableRefs(NamedTuple):
    """References of the kernel inputs that tables are made from, and of the tables.

    Attributes:
      factors: as in `TableParams`.
      scales: of to_state, from_state and taps.
      omega: added to the tap of lag 0.
      decay: q^T and q^tile, each as the factors of the same and of the swapped half.
      to_state: table that projects tokens to the state after a block.
      from_state: table that projects the state before a block to outputs.
      taps: for `toeplitz`.
    """

    factors: Any
    scales: Any
    omega: Any
    decay: Any
    to_state: Any
    from_state: Any
    taps: Any


def make_table_params(params: CemaParams, tile_sizes: tuple[int, int]) -> TableParams:
    """Parameters of all tables; D is a multiple of 128, tile sizes are (forward, backward)."""
    order = layout.padded_order(params.alpha.shape[1])
    exponents = [*(2**bit for bit in range(_BITS + 1)), *tile_sizes]
    powers = coefficients.powers(params, jnp.asarray(exponents, jnp.int32))
    q = powers[..., 0]
    p = coefficients.input_weight(params)
    gamma = coefficients.output_weight(params)
    rows = [layout.to_lanes(powers[..., bit], order) for bit in range(_BITS)]
    factors = lax.stop_gradient(jnp.stack([*rows, jnp.zeros_like(rows[0])], axis=1))
    return TableParams(
        to_state=layout.to_lanes(p.astype(gamma.dtype), order),
        from_state=layout.to_lanes(gamma * q, order),
        taps=layout.to_lanes(gamma * p, order),
        q=layout.to_lanes(q, order),
        omega=params.omega,
        decay=layout.to_lanes(powers[..., _BITS], order),
        factors=factors,
        tile_decays=lax.stop_gradient(
            jnp.stack([layout.to_lanes(powers[..., i], order) for i in (-2, -1)])
        ),
    )


def kernel_inputs(
    table_params: TableParams, plan: CemaTpuPlan, *, backward: bool
) -> dict[str, Array]:
    """Inputs of a kernel by name, for `TableRefs`."""
    scales = [table_params.to_state, table_params.from_state, table_params.taps]
    omega = table_params.omega.reshape(-1, plan.group_size, 1)
    factors = []
    for decay in (table_params.decay, table_params.tile_decays[int(backward)]):
        re, im = decay[:, :HALF], decay[:, HALF:]
        factors += [jnp.concatenate(pair, axis=-1) for pair in ((re, re), (-im, im))]
    return {
        "factors": table_params.factors,
        "scales": _pad_rows(jnp.stack(scales, axis=1)),
        "omega": jnp.pad(omega, ((0, 0), (0, SUBLANES - plan.group_size), (0, BLOCK - 1))),
        "decay": jnp.stack(factors, axis=1),
    }


def _pad_rows(a: Float[Array, "G R 128"]) -> Float[Array, "G 8 128"]:
    return jnp.pad(a, ((0, 0), (0, SUBLANES - a.shape[1]), (0, 0)))


def table_scratch(plan: CemaTpuPlan) -> dict[str, Any]:
    """Scratch for the tables by name, for `TableRefs`."""
    terms, dtype = (1, jnp.float32) if plan.exact else (2, jnp.bfloat16)
    table = pltpu.VMEM((plan.num_groups, terms, LANES, BLOCK), dtype)
    pairs = jnp.float32 if plan.exact else jnp.int32
    return {
        "to_state": table,
        "from_state": table,
        "taps": pltpu.VMEM((CHANNELS, terms, BLOCK), pairs),
    }


def make_tables(refs: TableRefs, group: Array, plan: CemaTpuPlan, *, reversed_taps: bool) -> None:
    """Writes the tables of one group of channels."""
    factors = refs.factors[group]
    forward = _powers(factors, backward=False)
    backward = _powers(factors, backward=True)
    to_state = _complex_multiply(backward, refs.scales[group, 0:1, :])
    from_state = _complex_multiply(forward, refs.scales[group, 1:2, :]) * _conjugation()
    for target, table in ((refs.to_state, to_state), (refs.from_state, from_state)):
        for i, term in enumerate(layout.split_terms(table.T, plan.exact)):
            target[group, i] = term
    by_order = _complex_multiply(backward if reversed_taps else forward, refs.scales[group, 2:3, :])
    shape = (SUBLANES, LANES)
    row = lax.broadcasted_iota(jnp.int32, shape, 0)
    lane = lax.broadcasted_iota(jnp.int32, shape, 1)
    own = jnp.where((row == lane // plan.order) & (lane < HALF), 1.0, 0.0)
    taps = layout.multiply((own,), (by_order,), (1, 1), plan)
    if reversed_taps:
        taps = pltpu.roll(taps, 1, 1)
    taps += refs.omega[group]
    terms = layout.pack_taps(taps, plan)
    for i in range(plan.group_size):
        for term, rows in enumerate(terms):
            refs.taps[group * plan.group_size + i, term] = rows[i]


def _powers(factors: Float[Array, "8 128"], *, backward: bool) -> Float[Array, "T 128"]:
    """q^t, or q^(T-1-t), for every lane's order."""
    sublane = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
    lane = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)
    first = jnp.where(lane < HALF, 1.0, 0.0)
    exponent = SUBLANES - 1 - sublane if backward else sublane
    for bit in range(3):
        multiplied = _complex_multiply(first, factors[bit : bit + 1])
        first = jnp.where((exponent >> bit) & 1 == 1, multiplied, first)
    registers = [first]
    for bit in range(3, _BITS):
        registers += [_complex_multiply(low, factors[bit : bit + 1]) for low in registers]
    return jnp.concatenate(registers[::-1] if backward else registers, axis=0)


def _complex_multiply(
    a: Float[Array, "R 128"], factor: Float[Array, "1 128"]
) -> Float[Array, "R 128"]:
    swapped = layout.rotate_half(factor)
    is_real = lax.broadcasted_iota(jnp.int32, (1, LANES), 1) < HALF
    same = jnp.where(is_real, factor, swapped)
    other = jnp.where(is_real, -swapped, factor)
    return a * same + layout.rotate_half(a) * other


def _conjugation() -> Float[Array, "1 128"]:
    return jnp.where(lax.broadcasted_iota(jnp.int32, (1, LANES), 1) < HALF, 1.0, -1.0)


def sum_moments(refs: Any, group: Array, plan: CemaTpuPlan) -> None:
    """Σ conj(q^t) g[t] and Σ t conj(q^t) g[t] of the gradients g of one group's tables."""
    factors = refs.tables.factors[group]
    time = lax.broadcasted_iota(jnp.int32, (BLOCK, LANES), 0).astype(jnp.float32)
    forward = _powers(factors, backward=False)
    to_state = refs.d_to_state[group].T
    from_state = refs.d_from_state[group].T * _conjugation()
    rows = []
    for gradient, powers, exponent in (
        (to_state, _powers(factors, backward=True), BLOCK - 1 - time),
        (from_state, forward, time),
    ):
        products = (powers * gradient, powers * layout.rotate_half(gradient))
        rows += [a.sum(axis=0, keepdims=True) for a in products]
        rows += [(exponent * a).sum(axis=0, keepdims=True) for a in products]
    refs.moments[group, :SUBLANES, :] = jnp.concatenate(rows, axis=0)
    refs.moments[group, SUBLANES:, :] = _moments_of_taps(refs, group, forward, plan)


def _moments_of_taps(
    refs: Any, group: Array, powers: Array, plan: CemaTpuPlan
) -> Float[Array, "8 128"]:
    lags = lax.broadcasted_iota(jnp.int32, (1, BLOCK), 1).astype(jnp.float32)
    taps = [
        layout.unfold_diagonals(refs.d_taps[group * plan.group_size + i])
        for i in range(plan.group_size)
    ]
    rows = jnp.concatenate(taps + [tap * lags for tap in taps], axis=0)
    if plan.group_size * 2 < SUBLANES:
        rows = jnp.concatenate([rows, jnp.zeros((SUBLANES - rows.shape[0], BLOCK))], axis=0)
    sums = layout.multiply((rows,), (powers,), (1, 0), plan)
    shape = (SUBLANES, LANES)
    row = lax.broadcasted_iota(jnp.int32, shape, 0)
    channel = lax.broadcasted_iota(jnp.int32, shape, 1) % HALF // plan.order
    parts = [jnp.where(row == channel + i * plan.group_size, sums, 0.0) for i in (0, 1)]
    omega = jnp.concatenate(taps, axis=0)[:, :1]
    pad = jnp.zeros((SUBLANES - 2 - plan.group_size, LANES))
    moments = [part.sum(axis=0, keepdims=True) for part in parts]
    return jnp.concatenate(
        [*moments, jnp.broadcast_to(omega, (plan.group_size, LANES)), pad], axis=0
    )


def table_param_gradients(
    moments: Float[Array, "G 16 128"],
    decay: Float[Array, "G 2 128"],
    table_params: TableParams,
    plan: CemaTpuPlan,
) -> TableParams:
    """Gradients of the table parameters from the sums of the backward kernel.

    For a table scale · q^t with gradient g[t] the scale's gradient is Σ conj(q^t) g[t], and q gets
    conj(scale / q) Σ t conj(q^t) g[t].
    """
    to_state = _conjugate_product(moments[:, 0], moments[:, 1])
    to_state_t = _conjugate_product(moments[:, 2], moments[:, 3])
    from_state = _conjugate_product(moments[:, 4], moments[:, 5])
    from_state_t = _conjugate_product(moments[:, 6], moments[:, 7])
    sign = jnp.where(jnp.arange(LANES) < HALF, 1.0, -1.0)
    taps, taps_t = moments[:, 8] * sign, moments[:, 9] * sign
    q = _complex(table_params.q)
    d_q = sum(
        _complex(moment) * jnp.conj(_complex(scale) / jnp.where(q == 0, 1, q))
        for moment, scale in (
            (to_state_t, table_params.to_state),
            (from_state_t, table_params.from_state),
            (taps_t, table_params.taps),
        )
    )
    return TableParams(
        to_state=to_state,
        from_state=from_state,
        taps=taps,
        q=jnp.concatenate([d_q.real, d_q.imag], axis=-1),
        omega=moments[:, 10 : 10 + plan.group_size, 0].reshape(-1),
        decay=_conjugate_product(decay[:, 0], decay[:, 1]),
        factors=jnp.zeros_like(table_params.factors),
        tile_decays=jnp.zeros_like(table_params.tile_decays),
    )


def _conjugate_product(same: Array, swapped: Array) -> Float[Array, "G 128"]:
    """Σ conj(a) b from Σ a b and Σ a b', elementwise; b' has its two halves swapped."""
    re = same[:, :HALF] + same[:, HALF:]
    im = swapped[:, :HALF] - swapped[:, HALF:]
    return jnp.concatenate([re, im], axis=-1)


def _complex(a: Float[Array, "G 128"]) -> Array:
    return lax.complex(a[:, :HALF], a[:, HALF:])
