"""CEMA on TPU: one fused kernel forward, one backward, over blocks of 128 tokens on the MXU.

x is read and y written once, in (B, L, D) layout; README.md has the algorithm and its cost.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Complex, Float, Int32

from pallas_kernels.cema import coefficients
from pallas_kernels.cema.pallas_tpu.backward import cema_backward
from pallas_kernels.cema.pallas_tpu.block_sizes import SMALLEST_TILE, tile_for
from pallas_kernels.cema.pallas_tpu.forward import cema_forward
from pallas_kernels.cema.pallas_tpu.layout import (
    BLOCK,
    CHANNELS,
    Documents,
    Plan,
    from_lanes,
    padded_order,
    to_lanes,
)
from pallas_kernels.cema.pallas_tpu.tables import TableSeeds, table_seeds
from pallas_kernels.cema.segments import (
    Pieces,
    count_leading_padding,
    cut_into_pieces,
    find_row_ends,
    rotate_rows,
)
from pallas_kernels.cema.types import CemaOutput, CemaParams
from pallas_kernels.common.residuals import name_residuals
from pallas_kernels.common.target import check_tpu, is_interpreted


def cema_pallas_tpu(
    x: Float[Array, "B L D"],
    params: CemaParams,
    state: Complex[Array, "B D N"] | None,
    segment_ids: Int32[Array, "B L"] | None,
    *,
    block_size: int | None = None,
    interpret: bool | pltpu.InterpretParams | None = None,
) -> CemaOutput:
    """`api.cema` by Pallas kernels for TPU; differentiable in reverse mode.

    For bfloat16 x, products take x as it is and tables and states as two bfloat16 terms, which adds
    1e-5 to outputs whose own rounding is 1.7e-3. For float32 x all products are float32.

    Args:
      x: bfloat16 or float32.
      params: float32.
      state: as in `api.cema`.
      segment_ids: as in `api.cema`.
      block_size: tokens of one grid step, a multiple of 1,024; that of `tpu_block_sizes` for the
        device if None.
      interpret: runs the kernels without a TPU, see `pallas_call`; by default inside
        `target.interpreted`.

    Raises:
      ValueError: float64 inputs, a block size that is no multiple of 1,024, no TPU or an unknown
        one, or N above 16 on TPU v4.
    """
    for name, value in {"x": x, **params._asdict()}.items():
        if value.dtype == jnp.float64:
            raise ValueError(
                f"{name} is float64, which TPUs lack; use implementation 'xla' or 'reference'"
            )
    interpret = is_interpreted() if interpret is None else interpret
    plans = _make_plans(x, params, block_size, interpret)
    if segment_ids is None:
        return _call(x, params, state, None, plans)
    if state is None:
        return _call(x, params, None, segment_ids, plans)
    # A carried state enters at the row's first token, so leading padding goes to the end meanwhile.
    lead = count_leading_padding(segment_ids)
    rolled = _call(rotate_rows(x, lead), params, state, rotate_rows(segment_ids, lead), plans)
    return CemaOutput(rotate_rows(rolled.y, -lead), rolled.final_state)


def _make_plans(
    x: Array, params: CemaParams, block_size: int | None, interpret: bool | pltpu.InterpretParams
) -> tuple[Plan, Plan]:
    device = None if interpret else check_tpu("pallas_tpu")
    tile = tile_for(device)
    if block_size is not None and (block_size < 1 or block_size % SMALLEST_TILE):
        raise ValueError(f"block_size is {block_size}; needs a multiple of {SMALLEST_TILE} tokens")
    exact, order = x.dtype == jnp.float32, padded_order(params.alpha.shape[1])
    largest = -(-x.shape[1] // SMALLEST_TILE) * SMALLEST_TILE
    sizes = tile.tokens_for(float32=exact, large_order=order > 16)
    if device is not None and order > tile.largest_order:
        raise ValueError(
            f"the kernels' tables for N = {params.alpha.shape[1]} do not fit into the memory of "
            f"{device}; N can be up to {tile.largest_order}, or use implementation 'xla'"
        )
    if block_size is not None:
        sizes = (block_size, block_size)
    forward, backward = (
        Plan(
            length=x.shape[1],
            blocks=min(size, largest) // BLOCK,
            order=order,
            exact=exact,
            unroll=1 if interpret else unroll,
            vmem_limit=tile.vmem_limit,
            interpret=interpret,
        )
        for size, unroll in zip(sizes, tile.unroll, strict=True)
    )
    return forward, backward


def _call(
    x: Array,
    params: CemaParams,
    state: Array | None,
    segment_ids: Array | None,
    plans: tuple[Plan, Plan],
) -> CemaOutput:
    rows, length, channels = x.shape
    params = _pad_channels(params, -channels % CHANNELS)
    x = jnp.pad(x, ((0, 0), (0, max(plans[0].tile - length, 0)), (0, -channels % CHANNELS)))
    shape = (rows, *params.alpha.shape)
    if state is None:
        state = jnp.zeros(shape, jnp.complex64)
    else:
        state = jnp.pad(state, ((0, 0), (0, shape[1] - channels), (0, 0)))
    if segment_ids is None:
        pieces, documents = None, None
        picked_block = jnp.full(rows, (length - 1) // BLOCK, jnp.int32)
    else:
        blocks = plans[0].tiles * plans[0].blocks
        padded = jnp.pad(segment_ids, ((0, 0), (0, blocks * BLOCK - length)))
        pieces = cut_into_pieces(padded, BLOCK)
        picked_block = find_row_ends(pieces).position // BLOCK
        documents = _find_documents(pieces, plans)
    order = plans[0].order
    seeds = table_seeds(params, (plans[0].tile, plans[1].tile))
    y, picked = _sequence(x, seeds, to_lanes(state, order), documents, picked_block, plans)
    entering = from_lanes(picked, order, shape[2])

    def add_up(tail: Float[Array, "B T D"]) -> Complex[Array, "B D N"]:
        added = _add_up_tail(tail, seeds, plans)
        return from_lanes(added, order, shape[2])

    last = _last_state(x, params, state, entering, pieces, length, add_up)
    return CemaOutput(y[:, :length, :channels], last[:, :channels])


def _pad_channels(params: CemaParams, missing: int) -> CemaParams:
    if not missing:
        return params
    return CemaParams(
        *(jnp.pad(value, ((0, missing),) + ((0, 0),) * (value.ndim - 1)) for value in params)
    )


def _find_documents(pieces: Pieces, plans: tuple[Plan, Plan]) -> tuple[Documents, Documents]:
    cuts = pieces.index[..., -1]
    piece = jnp.where(pieces.is_token, pieces.index, -1)
    from_end = jnp.where(pieces.is_token, cuts[..., None] - pieces.index, -1)

    def by_tile(plan: Plan) -> Documents:
        most = cuts.reshape(cuts.shape[0], -1, plan.blocks).max(axis=-1)
        return Documents(piece, from_end, cuts, most)

    return by_tile(plans[0]), by_tile(plans[1])


def _last_state(
    x: Array,
    params: CemaParams,
    state: Array,
    entering: Array,
    pieces: Pieces | None,
    length: int,
    add_up: Callable[[Array], Array],
) -> Array:
    """The state after each row's last token, from that entering the token's block."""
    if pieces is None:
        start = (length - 1) // BLOCK * BLOCK
        count = length - start
        decay = coefficients.powers(params, jnp.full(1, count, jnp.int32))[..., 0]
        tail = jnp.pad(x[:, start:length], ((0, 0), (BLOCK - count, 0), (0, 0)))
        return decay * entering + add_up(tail)
    end = find_row_ends(pieces)
    offset = jnp.arange(BLOCK, dtype=jnp.int32)
    index = jnp.maximum(end.position[:, None] - (BLOCK - 1) + offset, 0)
    tail = jnp.take_along_axis(x, index[..., None], axis=1)
    has_tokens = pieces.is_token.any(axis=(1, 2))[:, None]
    tail = jnp.where(((offset >= BLOCK - end.length[:, None]) & has_tokens)[..., None], tail, 0)
    decay = jnp.moveaxis(coefficients.powers(params, end.length), -1, 0)
    carried = jnp.where(end.sees_carry[:, None, None], decay * entering, 0)
    return jnp.where(has_tokens[..., None], carried + add_up(tail), state)


def _add_up_tail(
    tail: Float[Array, "B T D"], seeds: TableSeeds, plans: tuple[Plan, Plan]
) -> Float[Array, "B G 128"]:
    """What a block of tokens adds to the state after it."""
    # The row starts from zero and only its first block counts, so decays over a tile play no part.
    length = SMALLEST_TILE
    forward, backward = (plan._replace(length=length, blocks=length // BLOCK) for plan in plans)
    rows = tail.shape[0]
    padded = jnp.pad(tail, ((0, 0), (0, length - BLOCK), (0, 0)))
    zero = jnp.zeros((rows, *seeds.decay.shape), jnp.float32)
    second_block = jnp.ones(rows, jnp.int32)
    return _sequence(padded, seeds, zero, None, second_block, (forward, backward))[1]


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _sequence(
    x: Float[Array, "B L D"],
    seeds: TableSeeds,
    initial: Float[Array, "B G 128"],
    documents: tuple[Documents, Documents] | None,
    picked_block: Int32[Array, " B"],
    plans: tuple[Plan, Plan],
) -> tuple[Float[Array, "B L D"], Float[Array, "B G 128"]]:
    """y and, for every row, the state entering its block `picked_block`."""
    first = documents[0] if documents else None
    result = cema_forward(x, seeds, initial, first, picked_block, plans[0], save_states=False)
    return result.y, result.picked


def _sequence_forward(x, seeds, initial, documents, picked_block, plans):
    first = documents[0] if documents else None
    result = cema_forward(x, seeds, initial, first, picked_block, plans[0], save_states=True)
    result = name_residuals(result, "cema")
    return (result.y, result.picked), (x, seeds, result.states, documents, picked_block)


def _sequence_backward(plans, residuals, cotangents):
    x, seeds, states, documents, picked_block = residuals
    dy, d_picked = cotangents
    second = documents[1] if documents else None
    grads = cema_backward(x, dy, d_picked, states, seeds, second, picked_block, plans[1])
    return grads.x, grads.seeds, grads.initial, None, None


_sequence.defvjp(_sequence_forward, _sequence_backward)
