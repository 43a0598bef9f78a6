"""CEMA in plain JAX, blocks of T tokens at a time, for every platform. README.md derives it.

The sequence stays in (B, L, D) layout. Inside a block, y is a sum over lags, fused into one pass
over the sequence. Between blocks, small matrix products project tokens to one state per block, and
states to outputs.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Complex, Float, Int32

from pallas_kernels.cema import coefficients
from pallas_kernels.cema.block_scan import level_exponents, scan_blocks
from pallas_kernels.cema.block_sizes import STEPPED_LENGTH, XLA_BLOCK_SIZE
from pallas_kernels.cema.coefficients import BlockTables, pack, unpack
from pallas_kernels.cema.segments import (
    SegmentPieces,
    count_left_padding,
    find_row_ends,
    find_segment_pieces,
    rotate_rows,
    take_last_pieces,
)
from pallas_kernels.cema.types import CemaOutput, CemaParams
from pallas_kernels.common.residuals import name_residuals


def cema_xla(
    x: Float[Array, "B L D"],
    params: CemaParams,
    initial_state: Complex[Array, "B D N"] | None,
    segment_ids: Int32[Array, "B L"] | None,
    *,
    block_size: int | None = None,
) -> CemaOutput:
    """`block_size` tokens at a time; up to STEPPED_LENGTH tokens run through the recurrence."""
    if x.shape[1] <= STEPPED_LENGTH and block_size is None:
        return _step_through(x, params, initial_state, segment_ids)
    block_size = min(block_size or XLA_BLOCK_SIZE, x.shape[1])
    if segment_ids is None:
        return _one_document(x, params, initial_state, block_size)
    if initial_state is None:
        return _packed(x, params, _zero_state(x, params), segment_ids, block_size)
    # The initial state belongs before the first token, so left padding moves to the row's end.
    left_padding = count_left_padding(segment_ids)
    x, segment_ids = rotate_rows(x, left_padding), rotate_rows(segment_ids, left_padding)
    rotated = _packed(x, params, initial_state, segment_ids, block_size)
    return CemaOutput(rotate_rows(rotated.y, -left_padding), rotated.final_state)


def _zero_state(x: Array, params: CemaParams) -> Array:
    return jnp.zeros(
        (x.shape[0], *params.alpha.shape), jnp.result_type(params.alpha, jnp.complex64)
    )


def _step_through(
    x: Array, params: CemaParams, initial_state: Array | None, segment_ids: Array | None
) -> CemaOutput:
    q = coefficients.powers(params, jnp.ones(1, jnp.int32))[..., 0]
    p, gamma = coefficients.input_weight(params), coefficients.output_weight(params)
    h = _zero_state(x, params) if initial_state is None else initial_state
    last_segment = jnp.zeros(x.shape[:1], jnp.int32)
    outputs = []
    for t in range(x.shape[1]):
        x_t = x[:, t].astype(p.dtype)
        if segment_ids is None:
            h = q * h + p * x_t[..., None]
            outputs.append((gamma * h).real.sum(-1) + params.omega * x_t)
            continue
        segment = segment_ids[:, t]
        is_token = segment != 0
        starts = is_token & (last_segment != 0) & (segment != last_segment)
        last_segment = jnp.where(is_token, segment, last_segment)
        x_t = jnp.where(is_token[:, None], x_t, 0)
        new_h = q * jnp.where(starts[:, None, None], 0, h) + p * x_t[..., None]
        h = jnp.where(is_token[:, None, None], new_h, h)
        y_t = (gamma * new_h).real.sum(-1) + params.omega * x_t
        outputs.append(jnp.where(is_token[:, None], y_t, 0))
    return CemaOutput(jnp.stack(outputs, axis=1).astype(x.dtype), h)


def _tables(params: CemaParams, length: int, block_size: int) -> tuple[BlockTables, Array]:
    exponents = level_exponents(-(-length // block_size), block_size)
    # Recomputing the powers in the backward pass is cheaper than saving them.
    build = jax.checkpoint(lambda p: coefficients.block_tables(p, block_size, exponents))
    return build(params)


def _one_document(
    x: Array, params: CemaParams, initial_state: Array | None, block_size: int
) -> CemaOutput:
    rows, length, _ = x.shape
    tables, powers = _tables(params, length, block_size)
    state = _zero_state(x, params) if initial_state is None else initial_state
    last_block = (length - 1) // block_size
    y, previous_state = _blocks(x, tables, _channels_first(state), None, jnp.full(rows, last_block))
    tail_length = length - last_block * block_size
    tail = x[:, last_block * block_size :].astype(tables.taps.dtype)
    added = _tail_state(tail, tables.to_state[:, block_size - tail_length :])
    return CemaOutput(y, powers[..., tail_length] * _rows_first(previous_state) + added)


def _packed(
    x: Array, params: CemaParams, initial_state: Array, segment_ids: Array, block_size: int
) -> CemaOutput:
    tables, powers = _tables(params, x.shape[1], block_size)
    segment_pieces = find_segment_pieces(segment_ids, block_size)
    end = find_row_ends(segment_pieces)
    y, previous_state = _blocks(
        x, tables, _channels_first(initial_state), segment_pieces, end.position // block_size
    )
    # Right-aligned, so that one table serves every row.
    tail, has_tokens = take_last_pieces(x, segment_pieces, end, tables.taps.dtype)
    decay = jnp.moveaxis(powers[..., end.length], -1, 0)
    carried = jnp.where(end.in_first[:, None, None], decay * _rows_first(previous_state), 0)
    final = carried + _tail_state(tail, tables.to_state)
    return CemaOutput(y, jnp.where(has_tokens[..., None], final, initial_state))


def _tail_state(tail: Array, to_state: Array) -> Array:
    return unpack(jnp.einsum("btd,dtm->bdm", tail, to_state, precision=lax.Precision.HIGHEST))


def _channels_first(state: Array) -> Array:
    return pack(jnp.swapaxes(state, 0, 1))


def _rows_first(packed_state: Array) -> Array:
    return jnp.swapaxes(unpack(packed_state), 0, 1)


@jax.custom_vjp
def _blocks(
    x: Float[Array, "B L D"],
    tables: BlockTables,
    initial: Float[Array, "D B 2N"],
    segment_pieces: SegmentPieces | None,
    selected_block: Int32[Array, " B"],
) -> tuple[Float[Array, "B L D"], Float[Array, "D B 2N"]]:
    """y and, for every row, the state before its block `selected_block`."""
    return _blocks_forward(x, tables, initial, segment_pieces, selected_block)[0]


def _blocks_forward(x, tables, initial, segment_pieces, selected_block):
    in_first, in_last, passes_state_through = _masks(segment_pieces)
    x_last = _to_blocks(x, tables, in_last)
    increments = _contract("bjtd,dtm->dbjm", x_last, tables.to_state, x.dtype)
    states = scan_blocks(increments, passes_state_through, tables.decay_levels, initial)
    carried = _contract("dbjm,dmt->bjtd", states, tables.from_state, x.dtype)
    states, carried, y = lax.optimization_barrier((states, carried, x))
    y = _sum_over_lags(y, tables.taps, _age(x, tables, segment_pieces))
    y += _from_blocks(_zero_unless(in_first, carried), x.shape[1])
    # Without the barrier a consumer recomputes the sum over lags, or materializes every lag.
    y = lax.optimization_barrier(_mask_padding(y, segment_pieces).astype(x.dtype))
    index = selected_block[None, :, None, None]
    previous_state = jnp.take_along_axis(states, index, axis=2)[:, :, 0]
    y, previous_state, states = name_residuals((y, previous_state, states), "cema")
    return (y, previous_state), (x, tables, states, segment_pieces, selected_block)


def _blocks_backward(residuals, cotangents):
    x, tables, states, segment_pieces, selected_block = residuals
    dy, d_previous_state = cotangents
    in_first, in_last, passes_state_through = _masks(segment_pieces)
    dy_first = _to_blocks(dy, tables, in_first)
    d_states = _contract("bjtd,dmt->dbjm", dy_first, tables.from_state, x.dtype)
    is_selected = jnp.arange(d_states.shape[2]) == selected_block[:, None]
    d_states += jnp.where(is_selected[..., None], d_previous_state[:, :, None], 0)
    d_increments = scan_blocks(d_states, passes_state_through, tables.decay_levels, None)
    d_from_state = _contract("dbjm,bjtd->dmt", states, dy_first, x.dtype)
    d_carried = _zero_unless(passes_state_through, d_increments)
    d_decay = _sum_conjugate_products(states, d_carried, x.dtype)
    d_initial = d_states[:, :, 0] + _conjugate_product(tables.decay[:, None], d_carried[:, :, 0])
    # Barriers make stages with few live sequences each: XLA's scheduler alone keeps more alive.
    x, dy, d_increments, d_from_state, d_decay, d_initial = lax.optimization_barrier(
        (x, dy, d_increments, d_from_state, d_decay, d_initial)
    )
    x_last = _to_blocks(x, tables, in_last)
    d_to_state = _contract("bjtd,dbjm->dtm", x_last, d_increments, x.dtype)
    d_taps = _taps_gradient(x, dy, tables, segment_pieces)
    dy, d_increments, d_to_state, d_taps = lax.optimization_barrier(
        (dy, d_increments, d_to_state, d_taps)
    )
    dx = _contract("dbjm,dtm->bjtd", d_increments, tables.to_state, x.dtype)
    dx = _from_blocks(_zero_unless(in_last, dx), x.shape[1])
    dx += _sum_over_lags_transposed(dy, tables.taps, _age(x, tables, segment_pieces))
    no_levels = jax.tree.map(jnp.zeros_like, tables.decay_levels)
    d_tables = BlockTables(d_taps, d_to_state, d_from_state, d_decay, no_levels)
    dx = lax.optimization_barrier(_mask_padding(dx, segment_pieces).astype(x.dtype))
    return dx, d_tables, d_initial, None, None


_blocks.defvjp(_blocks_forward, _blocks_backward)


def _conjugate_product(a: Float[Array, "*S 2N"], b: Float[Array, "*S 2N"]) -> Array:
    """conj(a) b of packed complex numbers."""
    half = a.shape[-1] // 2
    a_re, a_im, b_re, b_im = a[..., :half], a[..., half:], b[..., :half], b[..., half:]
    return jnp.concatenate([a_re * b_re + a_im * b_im, a_re * b_im - a_im * b_re], axis=-1)


def _sum_conjugate_products(
    a: Float[Array, "D B J 2N"], b: Float[Array, "D B J 2N"], dtype: jnp.dtype
) -> Float[Array, "D 2N"]:
    """Σ conj(a) b over rows and blocks: four diagonals of one product, without a temporary."""
    half = a.shape[-1] // 2
    products = _contract("dbjm,dbjk->dmk", a, b, dtype)
    diagonals = jnp.diagonal(products.reshape(-1, 2, half, 2, half), axis1=2, axis2=4)
    re = diagonals[:, 0, 0] + diagonals[:, 1, 1]
    im = diagonals[:, 0, 1] - diagonals[:, 1, 0]
    return jnp.concatenate([re, im], axis=-1)


def _taps_gradient(
    x: Array, dy: Array, tables: BlockTables, segment_pieces: SegmentPieces | None
) -> Array:
    """Σ dy[t] x[t-τ] in every piece: (T, T) products per channel, summed along diagonals."""

    def products(x_mask: Array | None, dy_mask: Array | None) -> Array:
        return _contract(
            "bjsd,bjtd->dst",
            _to_blocks(x, tables, x_mask),
            _to_blocks(dy, tables, dy_mask),
            x.dtype,
        )

    if segment_pieces is None:
        return _sum_diagonals(products(None, None))
    # Only s <= t counts, so the first piece needs a mask of t only and the last one of s only.
    last = segment_pieces.index[..., -1:]
    total = products(segment_pieces.is_token, segment_pieces.in_first)
    total += products(segment_pieces.in_last & (segment_pieces.index > 0), segment_pieces.is_token)

    def add_middle_piece(i: Array, total: Array) -> Array:
        mask = segment_pieces.is_token & (segment_pieces.index == i) & (i < last)
        return total + products(mask, mask)

    return _sum_diagonals(lax.fori_loop(1, jnp.max(last), add_middle_piece, total))


def _sum_diagonals(products: Float[Array, "D T T"]) -> Float[Array, "T D"]:
    channels, size, _ = products.shape
    # Rows of 2T reinterpreted as rows of 2T + 1 have element (s, s + τ) at (s, τ).
    flat = jnp.pad(products, ((0, 0), (0, 0), (0, size))).reshape(channels, -1)
    skewed = jnp.pad(flat, ((0, 0), (0, size))).reshape(channels, size, 2 * size + 1)
    return skewed[:, :, :size].sum(axis=1).T


def _sum_over_lags(x: Array, taps: Array, age: Array) -> Array:
    """Σ_τ taps[τ] x[t-τ] over lags within the token's piece of its block."""
    size, length = taps.shape[0], x.shape[1]
    padded = jnp.pad(x, ((0, 0), (size - 1, 0), (0, 0)))
    total = taps[0] * x.astype(taps.dtype)
    for lag in range(1, size):
        shifted = lax.slice_in_dim(padded, size - 1 - lag, size - 1 - lag + length, axis=1)
        total += taps[lag] * jnp.where(age >= lag, shifted, 0).astype(taps.dtype)
    return total


def _sum_over_lags_transposed(dy: Array, taps: Array, age: Array) -> Array:
    """The transpose of `_sum_over_lags`."""
    size, length = taps.shape[0], dy.shape[1]
    padded = jnp.pad(dy, ((0, 0), (0, size - 1), (0, 0)))
    padded_age = jnp.pad(age, ((0, 0), (0, size - 1), (0, 0)))
    total = taps[0] * dy.astype(taps.dtype)
    for lag in range(1, size):
        shifted = lax.slice_in_dim(padded, lag, lag + length, axis=1)
        reaches = lax.slice_in_dim(padded_age, lag, lag + length, axis=1) >= lag
        total += taps[lag] * jnp.where(reaches, shifted, 0).astype(taps.dtype)
    return total


def _age(x: Array, tables: BlockTables, segment_pieces: SegmentPieces | None) -> Array:
    """Tokens since the start of the token's piece of its block, (B or 1, L, 1)."""
    if segment_pieces is None:
        return (jnp.arange(x.shape[1], dtype=jnp.int32) % tables.taps.shape[0])[None, :, None]
    return segment_pieces.age.reshape(x.shape[0], -1)[:, : x.shape[1], None]


def _to_blocks(a: Array, tables: BlockTables, mask: Array | None) -> Array:
    size = tables.taps.shape[0]
    padded = jnp.pad(a, ((0, 0), (0, -a.shape[1] % size), (0, 0)))
    blocks = padded.reshape(a.shape[0], -1, size, a.shape[2]).astype(tables.taps.dtype)
    return _zero_unless(mask, blocks)


def _masks(segment_pieces: SegmentPieces | None) -> tuple[Array | None, Array | None, Array | None]:
    """`in_first`, `in_last` and `passes_state_through`."""
    if segment_pieces is None:
        return None, None, None
    return segment_pieces.in_first, segment_pieces.in_last, segment_pieces.passes_state_through


def _zero_unless(mask: Array | None, a: Array) -> Array:
    """Zero where not `mask`; the mask has no channel axis, None selects everything."""
    return a if mask is None else jnp.where(mask[..., None], a, 0)


def _from_blocks(blocks: Array, length: int) -> Array:
    return blocks.reshape(blocks.shape[0], -1, blocks.shape[3])[:, :length]


def _mask_padding(a: Array, segment_pieces: SegmentPieces | None) -> Array:
    if segment_pieces is None:
        return a
    return jnp.where(segment_pieces.is_token.reshape(a.shape[0], -1)[:, : a.shape[1], None], a, 0)


def _contract(spec: str, a: Array, b: Array, dtype: jnp.dtype) -> Array:
    """A product in a's dtype; for bfloat16 x, tensor cores may round operands to 2^-11 or better.

    That adds 3e-4 of error to outputs whose rounding to bfloat16 is 1.7e-3.
    """
    precision = lax.Precision.HIGH if dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=a.dtype)
