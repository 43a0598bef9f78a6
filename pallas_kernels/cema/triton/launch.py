"""Launches of CEMA's Triton kernels for one group of orders: operands, result shapes, grids."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.cema.row_splits.tables import CemaOperands
from pallas_kernels.cema.row_splits.types import (
    CHANNELS,
    CemaForwardResults,
    CemaGeometry,
    CemaGradientSums,
    CemaKernels,
)
from pallas_kernels.cema.triton.block_sizes import BACKWARD_UNROLL, FORWARD_UNROLL
from pallas_kernels.common import triton


def launch_summaries(
    x: Float[Array, "B L D"],
    operands: CemaOperands,
    geometry: CemaGeometry,
    *,
    splits: range,
    backward: bool,
    interpret: bool,
) -> Float[Array, "B S 2 N D"]:
    """The state that every split adds; contract as in `LaunchSummaries`."""
    tables, (bits, row_ends, _), unused = operands.tables, *_documents(operands)
    (summaries,) = _launch(
        "cema_summaries",
        [
            x,
            tables.coefficients,
            tables.damping,
            bits,
            row_ends,
            unused if operands.initial is None else operands.initial,
            geometry.tiles,
            geometry.tiles_per_split,
        ],
        [geometry.per_channel(len(splits), 2, geometry.order)],
        operands,
        geometry,
        num_splits=len(splits),
        constants={
            "FIRST_SPLIT": splits.start,
            "NUM_SUMMARIES": len(splits),
            "BACKWARD": backward,
            "UNROLL": FORWARD_UNROLL,
        },
        interpret=interpret,
    )
    return summaries


def launch_outputs(
    x: Float[Array, "B L D"],
    operands: CemaOperands,
    geometry: CemaGeometry,
    *,
    out_dtype: Any,
    save_split_states: bool,
    interpret: bool,
) -> CemaForwardResults:
    """y and the states; contract as in `LaunchOutputs`."""
    tables, (bits, row_ends, passes), unused = operands.tables, *_documents(operands)
    previous_states = jax.ShapeDtypeStruct((1,), jnp.float32)
    if save_split_states:
        previous_states = geometry.per_channel(geometry.splits, 2, geometry.order)
    summaries = unused if operands.summaries is None else operands.summaries
    y, final_state, states = _launch(
        "cema_outputs",
        [
            x,
            tables.coefficients,
            tables.omega,
            tables.damping,
            bits,
            row_ends,
            passes,
            unused if operands.initial is None else operands.initial,
            summaries,
            geometry.tiles,
            geometry.tiles_per_split,
            geometry.splits,
            summaries.shape[1],
        ],
        [
            jax.ShapeDtypeStruct(x.shape, out_dtype),
            geometry.per_channel(2, geometry.order),
            previous_states,
        ],
        operands,
        geometry,
        num_splits=geometry.splits,
        constants={"SAVE": save_split_states, "UNROLL": FORWARD_UNROLL},
        interpret=interpret,
    )
    return CemaForwardResults(y, final_state, states if save_split_states else None)


def launch_gradients(
    x: Float[Array, "B L D"],
    dy: Float[Array, "B L D"],
    operands: CemaOperands,
    geometry: CemaGeometry,
    *,
    out_dtype: Any,
    interpret: bool,
) -> CemaGradientSums:
    """dx and the sums for the parameters; contract as in `LaunchGradients`."""
    tables, (bits, row_ends, passes), unused = operands.tables, *_documents(operands)
    order, splits = geometry.order, geometry.splits
    summaries = unused if operands.summaries is None else operands.summaries
    results = _launch(
        "cema_gradients",
        [
            x,
            dy,
            tables.coefficients,
            tables.omega,
            tables.damping,
            bits,
            row_ends,
            passes,
            unused if operands.initial is None else operands.initial,
            summaries,
            operands.previous_states,
            geometry.tiles,
            geometry.tiles_per_split,
            splits,
            summaries.shape[1],
        ],
        [
            jax.ShapeDtypeStruct(x.shape, out_dtype),
            geometry.per_channel(splits, 2, order),
            geometry.per_channel(splits, 2, order),
            geometry.per_channel(splits),
            geometry.per_channel(2, order),
            geometry.per_channel(2, order),
        ],
        operands,
        geometry,
        num_splits=splits,
        constants={"UNROLL": BACKWARD_UNROLL},
        interpret=interpret,
    )
    return CemaGradientSums(*results)


TRITON_KERNELS = CemaKernels(launch_summaries, launch_outputs, launch_gradients)


def _documents(operands: CemaOperands) -> tuple[tuple[Array, Array, Array], Array]:
    """Pointers to the documents, and one for operands that a kernel does not read."""
    unused = operands.tables.coefficients
    if operands.documents is None:
        return (unused, unused, unused), unused
    documents = operands.documents
    pointers = documents.boundary_bits, documents.row_ends, documents.passes_state_through
    return pointers, unused


def _launch(
    name: str,
    arguments: list[Array | int],
    out_type: list[jax.ShapeDtypeStruct],
    operands: CemaOperands,
    geometry: CemaGeometry,
    *,
    num_splits: int,
    constants: dict[str, Any],
    interpret: bool,
) -> list[Array]:
    kernels = triton.load_kernels("pallas_kernels.cema.triton.kernels", interpret=interpret)
    shared = {
        "N": geometry.order,
        # Triton's tensors have powers of two as their sizes.
        "P": 1 << (geometry.order - 1).bit_length(),
        "WIDTH": geometry.channel_blocks * CHANNELS,
        "PACKED": operands.documents is not None,
    }
    if name != "cema_summaries" or operands.documents is not None:
        shared["HAS_INITIAL"] = operands.initial is not None
    else:
        shared["HAS_INITIAL"] = False
    return triton.launch(
        getattr(kernels, name),
        arguments,
        out_type,
        grid=(geometry.channel_blocks, num_splits, geometry.rows),
        constants=shared | constants,
        interpret=interpret,
    )
