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
    CemaTpuDocuments,
    CemaTpuPlan,
    from_lanes,
    padded_order,
    to_lanes,
)
from pallas_kernels.cema.pallas_tpu.tables import TableParams, make_table_params
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
from pallas_kernels.common.target import check_tpu, is_interpreted


def cema_pallas_tpu(
    x: Float[Array, "B L D"],
    params: CemaParams,
    initial_state: Complex[Array, "B D N"] | None,
    segment_ids: Int32[Array, "B L"] | None,
    *,
    block_size: int | None = None,
    interpret: bool | pltpu.InterpretParams | None = None,
) -> CemaOutput:
    """CEMA by the TPU kernels, differentiable in reverse mode; contract as in `api.cema`.

    For bfloat16 x, products take x as it is and tables and states as two bfloat16 terms, which adds
    1e-5 to outputs whose own rounding is 1.7e-3. For float32 x all products are float32.

    Args:
      x: bfloat16 or float32.
      params: float32.
      initial_state: the state before the row.
      segment_ids: the documents.
      block_size: tokens of one grid step, a multiple of 1,024; None: as in `block_sizes.TILES`.
      interpret: runs the kernels without a TPU, see `pallas_call`; None: inside
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
        return _call(x, params, initial_state, None, plans)
    if initial_state is None:
        return _call(x, params, None, segment_ids, plans)
    # The initial state belongs before the first token, so left padding moves to the row's end.
    left_padding = count_left_padding(segment_ids)
    x, segment_ids = rotate_rows(x, left_padding), rotate_rows(segment_ids, left_padding)
    rotated = _call(x, params, initial_state, segment_ids, plans)
    return CemaOutput(rotate_rows(rotated.y, -left_padding), rotated.final_state)


def final_state_pallas_tpu(
    x: Float[Array, "B L D"],
    params: CemaParams,
    segment_ids: Int32[Array, "B L"] | None,
    *,
    block_size: int | None = None,
) -> Complex[Array, "B D N"]:
    """The final state from zero by the forward kernel.

    Faster on a TPU than `final_state.final_state`, whose products are batched over channels.
    """
    return cema_pallas_tpu(x, params, None, segment_ids, block_size=block_size).final_state


def _make_plans(
    x: Array, params: CemaParams, block_size: int | None, interpret: bool | pltpu.InterpretParams
) -> tuple[CemaTpuPlan, CemaTpuPlan]:
    device = None if interpret else check_tpu("pallas_tpu")
    block_sizes = tile_for(device)
    if block_size is not None and (block_size < 1 or block_size % SMALLEST_TILE):
        raise ValueError(f"block_size is {block_size}; needs a multiple of {SMALLEST_TILE} tokens")
    exact, order = x.dtype == jnp.float32, padded_order(params.alpha.shape[1])
    largest = -(-x.shape[1] // SMALLEST_TILE) * SMALLEST_TILE
    sizes = block_sizes.tokens_for(float32=exact, large_order=order > 16)
    if device is not None and order > block_sizes.largest_order:
        raise ValueError(
            f"the kernels' tables for N = {params.alpha.shape[1]} do not fit into the memory of "
            f"{device}; N can be up to {block_sizes.largest_order}, or use implementation 'xla'"
        )
    if block_size is not None:
        sizes = (block_size, block_size)
    forward, backward = (
        CemaTpuPlan(
            length=x.shape[1],
            blocks=min(size, largest) // BLOCK,
            order=order,
            exact=exact,
            unroll=1 if interpret else unroll,
            vmem_limit=block_sizes.vmem_limit,
            interpret=interpret,
        )
        for size, unroll in zip(sizes, block_sizes.unroll, strict=True)
    )
    return forward, backward


def _call(
    x: Array,
    params: CemaParams,
    initial_state: Array | None,
    segment_ids: Array | None,
    plans: tuple[CemaTpuPlan, CemaTpuPlan],
) -> CemaOutput:
    rows, length, channels = x.shape
    params = _pad_channels(params, -channels % CHANNELS)
    x = jnp.pad(x, ((0, 0), (0, max(plans[0].tile_size - length, 0)), (0, -channels % CHANNELS)))
    shape = (rows, *params.alpha.shape)
    if initial_state is None:
        initial_state = jnp.zeros(shape, jnp.complex64)
    else:
        initial_state = jnp.pad(initial_state, ((0, 0), (0, shape[1] - channels), (0, 0)))
    if segment_ids is None:
        segment_pieces, documents = None, None
        last_block = jnp.full(rows, (length - 1) // BLOCK, jnp.int32)
    else:
        blocks = plans[0].num_tiles * plans[0].blocks
        padded = jnp.pad(segment_ids, ((0, 0), (0, blocks * BLOCK - length)))
        segment_pieces = find_segment_pieces(padded, BLOCK)
        last_block = find_row_ends(segment_pieces).position // BLOCK
        documents = _find_documents(segment_pieces, plans)
    order = plans[0].order
    table_params = make_table_params(params, (plans[0].tile_size, plans[1].tile_size))
    initial = to_lanes(initial_state, order)
    y, previous = _sequence(x, table_params, initial, documents, last_block, plans)
    previous_state = from_lanes(previous, order, shape[2])

    def project(tail: Float[Array, "B T D"]) -> Complex[Array, "B D N"]:
        return from_lanes(_project_block(tail, table_params, plans), order, shape[2])

    final_state = _final_state(
        x, params, initial_state, previous_state, segment_pieces, length, project
    )
    return CemaOutput(y[:, :length, :channels], final_state[:, :channels])


def _pad_channels(params: CemaParams, width: int) -> CemaParams:
    if not width:
        return params
    return CemaParams(
        *(jnp.pad(value, ((0, width),) + ((0, 0),) * (value.ndim - 1)) for value in params)
    )


def _find_documents(
    segment_pieces: SegmentPieces, plans: tuple[CemaTpuPlan, CemaTpuPlan]
) -> tuple[CemaTpuDocuments, CemaTpuDocuments]:
    cuts = segment_pieces.index[..., -1]
    piece = jnp.where(segment_pieces.is_token, segment_pieces.index, -1)
    from_end = jnp.where(segment_pieces.is_token, cuts[..., None] - segment_pieces.index, -1)

    def by_tile(plan: CemaTpuPlan) -> CemaTpuDocuments:
        most = cuts.reshape(cuts.shape[0], -1, plan.blocks).max(axis=-1)
        return CemaTpuDocuments(piece, from_end, cuts, most)

    return by_tile(plans[0]), by_tile(plans[1])


def _final_state(
    x: Array,
    params: CemaParams,
    initial_state: Array,
    previous_state: Array,
    segment_pieces: SegmentPieces | None,
    length: int,
    project: Callable[[Array], Array],
) -> Array:
    """The state after each row's last token, from the state before the token's block."""
    if segment_pieces is None:
        start = (length - 1) // BLOCK * BLOCK
        count = length - start
        decay = coefficients.powers(params, jnp.full(1, count, jnp.int32))[..., 0]
        tail = jnp.pad(x[:, start:length], ((0, 0), (BLOCK - count, 0), (0, 0)))
        return decay * previous_state + project(tail)
    end = find_row_ends(segment_pieces)
    tail, has_tokens = take_last_pieces(x, segment_pieces, end, x.dtype)
    decay = jnp.moveaxis(coefficients.powers(params, end.length), -1, 0)
    carried = jnp.where(end.in_first[:, None, None], decay * previous_state, 0)
    return jnp.where(has_tokens[..., None], carried + project(tail), initial_state)


def _project_block(
    tail: Float[Array, "B T D"], table_params: TableParams, plans: tuple[CemaTpuPlan, CemaTpuPlan]
) -> Float[Array, "B G 128"]:
    """The state that a block of tokens adds."""
    # A row of one tile from zero; the state before its second block is read, so that decays over
    # whole tiles, of another size here, have no influence.
    length = SMALLEST_TILE
    forward, backward = (plan._replace(length=length, blocks=length // BLOCK) for plan in plans)
    rows = tail.shape[0]
    padded = jnp.pad(tail, ((0, 0), (0, length - BLOCK), (0, 0)))
    zero = jnp.zeros((rows, *table_params.decay.shape), jnp.float32)
    second_block = jnp.ones(rows, jnp.int32)
    return _sequence(padded, table_params, zero, None, second_block, (forward, backward))[1]


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _sequence(
    x: Float[Array, "B L D"],
    table_params: TableParams,
    initial: Float[Array, "B G 128"],
    documents: tuple[CemaTpuDocuments, CemaTpuDocuments] | None,
    selected_block: Int32[Array, " B"],
    plans: tuple[CemaTpuPlan, CemaTpuPlan],
) -> tuple[Float[Array, "B L D"], Float[Array, "B G 128"]]:
    """y and, for every row, the state before its block `selected_block`."""
    first = documents[0] if documents else None
    result = cema_forward(
        x, table_params, initial, first, selected_block, plans[0], save_states=False
    )
    return result.y, result.selected_state


def _sequence_forward(x, table_params, initial, documents, selected_block, plans):
    first = documents[0] if documents else None
    result = cema_forward(
        x, table_params, initial, first, selected_block, plans[0], save_states=True
    )
    result = name_residuals(result, "cema")
    residuals = x, table_params, result.previous_states, documents, selected_block
    return (result.y, result.selected_state), residuals


def _sequence_backward(plans, residuals, cotangents):
    x, table_params, previous_states, documents, selected_block = residuals
    dy, d_selected_state = cotangents
    second = documents[1] if documents else None
    gradients = cema_backward(
        x, dy, d_selected_state, previous_states, table_params, second, selected_block, plans[1]
    )
    return gradients.x, gradients.table_params, gradients.initial, None, None


_sequence.defvjp(_sequence_forward, _sequence_backward)
