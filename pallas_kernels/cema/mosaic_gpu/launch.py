"""Launches of CEMA's Hopper kernels for one group of orders: operands, result shapes, grids."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.cema.mosaic_gpu.backward import CemaGradientSums, gradient_kernel
from pallas_kernels.cema.mosaic_gpu.forward import (
    CemaForwardResults,
    output_kernel,
    summary_kernel,
)
from pallas_kernels.cema.mosaic_gpu.layout import CHANNELS, CemaGeometry
from pallas_kernels.cema.mosaic_gpu.pipeline import CemaBuffers, make_buffers
from pallas_kernels.cema.mosaic_gpu.tables import CemaOperands
from pallas_kernels.common import mosaic_gpu


def launch_summaries(
    x: Float[Array, "B L D"],
    operands: CemaOperands,
    geometry: CemaGeometry,
    *,
    splits: range | None = None,
    backward: bool,
    interpret: Any,
) -> Float[Array, "B S 2 N D"]:
    """The state that every split adds, divided by p.

    Args:
      x: dy if `backward`, which gives the adjoint state e at the split's first token.
      operands: with the initial state if there is one: a row's first document starts from it, which
        after left padding happens inside a split.
      geometry: sizes.
      splits: which splits; None: all.
      backward: backward in time.
      interpret: as in `mosaic_gpu.launch`.
    """
    splits = range(geometry.splits) if splits is None else splits
    return _launch(
        partial(summary_kernel, geometry=geometry, first_split=splits.start, backward=backward),
        (x, operands),
        _per_channel(geometry, len(splits), 2, geometry.order),
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
    """y, the final state and, if asked for, the state before every split.

    Args:
      x: whole tiles of tokens and channels.
      operands: with the initial state; with the summaries of all splits if they are known.
      geometry: sizes.
      out_dtype: of y.
      save_split_states: whether to return the state before every split.
      interpret: as in `mosaic_gpu.launch`.
    """
    if operands.summaries is None and geometry.splits > 1:
        # No split follows the last one.
        summaries = launch_summaries(
            x,
            operands,
            geometry,
            splits=range(geometry.splits - 1),
            backward=False,
            interpret=interpret,
        )
        operands = operands._replace(summaries=summaries)
    previous_states = _per_channel(geometry, geometry.splits, 2, geometry.order)
    return _launch(
        partial(output_kernel, geometry=geometry),
        (x, operands),
        CemaForwardResults(
            jax.ShapeDtypeStruct(x.shape, out_dtype),
            _per_channel(geometry, 2, geometry.order),
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
    """dx, and the sums that the gradients of the parameters are made of.

    Args:
      x: whole tiles of tokens and channels.
      dy: like x.
      operands: with the states before the splits from `launch_outputs`; `initial` is e at the token
        after every row, if it is not zero; `summaries` those of dy for all splits, if they are
        known, with what `initial` leaves of itself in the last one.
      geometry: sizes.
      out_dtype: of dx.
      interpret: as in `mosaic_gpu.launch`.
    """
    order, splits = geometry.order, geometry.splits
    summaries = None
    if splits > 1 and operands.summaries is not None:
        summaries = operands.summaries[:, 1:]
    elif splits > 1:
        # No split precedes the first one.
        summaries = launch_summaries(
            dy,
            CemaOperands(operands.tables, operands.documents),
            geometry,
            splits=range(1, splits),
            backward=True,
            interpret=interpret,
        )
    return _launch(
        partial(gradient_kernel, geometry=geometry),
        (x, dy, operands._replace(summaries=summaries)),
        CemaGradientSums(
            jax.ShapeDtypeStruct(x.shape, out_dtype),
            x_e=_per_channel(geometry, splits, 2, order),
            x_k=_per_channel(geometry, splits, 2, order),
            x_dy=_per_channel(geometry, splits),
            first_e=_per_channel(geometry, 2, order),
            first_k=_per_channel(geometry, 2, order),
        ),
        make_buffers(inputs=[x.dtype, dy.dtype], outputs=[out_dtype]),
        geometry,
        name="cema_gradients",
        num_splits=splits,
        interpret=interpret,
    )


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


def _per_channel(geometry: CemaGeometry, *shape: int) -> jax.ShapeDtypeStruct:
    width = geometry.channel_blocks * CHANNELS
    return jax.ShapeDtypeStruct((geometry.rows, *shape, width), jnp.float32)
