"""Launches of CEMA's Hopper kernels for one group of orders: operands, result shapes, grids."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Float

from pallas_kernels.cema.mosaic_gpu.backward import gradient_kernel
from pallas_kernels.cema.mosaic_gpu.forward import output_kernel, summary_kernel
from pallas_kernels.cema.mosaic_gpu.pipeline import CemaBuffers, make_buffers
from pallas_kernels.cema.row_splits.tables import CemaOperands
from pallas_kernels.cema.row_splits.types import (
    CemaForwardResults,
    CemaGeometry,
    CemaGradientSums,
    CemaKernels,
)
from pallas_kernels.common import mosaic_gpu


def launch_summaries(
    x: Float[Array, "B L D"],
    operands: CemaOperands,
    geometry: CemaGeometry,
    *,
    splits: range,
    backward: bool,
    interpret: Any,
) -> Float[Array, "B S 2 N D"]:
    """The state that every split adds; contract as in `LaunchSummaries`."""
    return _launch(
        partial(summary_kernel, geometry=geometry, first_split=splits.start, backward=backward),
        (x, operands),
        geometry.per_channel(len(splits), 2, geometry.order),
        make_buffers(inputs=[x.dtype]),
        geometry,
        name="cema_summaries",
        num_splits=len(splits),
        interpret=interpret,
    )


def launch_outputs(
    x: Float[Array, "B L D"],
    operands: CemaOperands,
    geometry: CemaGeometry,
    *,
    out_dtype: Any,
    save_split_states: bool,
    interpret: Any,
) -> CemaForwardResults:
    """y and the states; contract as in `LaunchOutputs`."""
    previous_states = geometry.per_channel(geometry.splits, 2, geometry.order)
    return _launch(
        partial(output_kernel, geometry=geometry),
        (x, operands),
        CemaForwardResults(
            jax.ShapeDtypeStruct(x.shape, out_dtype),
            geometry.per_channel(2, geometry.order),
            previous_states if save_split_states else None,
        ),
        make_buffers(inputs=[x.dtype], outputs=[out_dtype]),
        geometry,
        name="cema_outputs",
        num_splits=geometry.splits,
        interpret=interpret,
    )


def launch_gradients(
    x: Float[Array, "B L D"],
    dy: Float[Array, "B L D"],
    operands: CemaOperands,
    geometry: CemaGeometry,
    *,
    out_dtype: Any,
    interpret: Any,
) -> CemaGradientSums:
    """dx and the sums for the parameters; contract as in `LaunchGradients`."""
    order, splits = geometry.order, geometry.splits
    return _launch(
        partial(gradient_kernel, geometry=geometry),
        (x, dy, operands),
        CemaGradientSums(
            jax.ShapeDtypeStruct(x.shape, out_dtype),
            x_e=geometry.per_channel(splits, 2, order),
            x_k=geometry.per_channel(splits, 2, order),
            x_dy=geometry.per_channel(splits),
            first_e=geometry.per_channel(2, order),
            first_k=geometry.per_channel(2, order),
        ),
        make_buffers(inputs=[x.dtype, dy.dtype], outputs=[out_dtype]),
        geometry,
        name="cema_gradients",
        num_splits=splits,
        interpret=interpret,
    )


MOSAIC_GPU_KERNELS = CemaKernels(launch_summaries, launch_outputs, launch_gradients)


def _launch(
    kernel: Callable[..., None],
    operands: Any,
    out_type: Any,
    buffers: CemaBuffers,
    geometry: CemaGeometry,
    *,
    name: str,
    num_splits: int,
    interpret: Any,
) -> Any:
    return mosaic_gpu.launch(
        kernel,
        operands,
        out_type,
        name=name,
        grid={"d": geometry.channel_blocks, "s": num_splits, "b": geometry.rows},
        scratch=buffers,
        interpret=interpret,
    )
