"""Launches of the four Hopper kernels: grids, shared memory, shapes of results."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.common import mosaic_gpu
from pallas_kernels.timestep_norm.mosaic_gpu.backward import gradients_kernel, slopes_kernel
from pallas_kernels.timestep_norm.mosaic_gpu.forward import moments_kernel, outputs_kernel
from pallas_kernels.timestep_norm.mosaic_gpu.operands import kernel_scratch
from pallas_kernels.timestep_norm.row_splits.documents import pack_token_info
from pallas_kernels.timestep_norm.row_splits.state_passing import next_slopes, previous_states
from pallas_kernels.timestep_norm.row_splits.types import (
    TILE,
    Gradients,
    KernelInputs,
    Outputs,
    TimestepNormGpuOptions,
    TimestepNormKernels,
)


def run_moments(
    options: TimestepNormGpuOptions, inputs: KernelInputs, num_splits: int
) -> Float[Array, "B J G 4"]:
    """Summaries of the first `num_splits` splits: count, pivot, offset of the mean, squares."""
    geometry = options.geometry
    return _launch(
        options,
        partial(moments_kernel, geometry=geometry),
        inputs._replace(scale=None, bias=None),
        jax.ShapeDtypeStruct((geometry.rows, num_splits, geometry.groups, 4), jnp.float32),
        name="timestep_norm_moments",
        num_splits=num_splits,
    )


def run_outputs(
    options: TimestepNormGpuOptions, inputs: KernelInputs, *, save_statistics: bool
) -> Outputs:
    """y and the final moments; with `save_statistics` what the backward pass needs."""
    geometry, x = options.geometry, inputs.x
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    rows, groups, is_packed = geometry.rows, geometry.groups, inputs.documents is not None
    out_type = Outputs(
        y=jax.ShapeDtypeStruct(x.shape, x.dtype),
        final_moments=shape((rows, groups, 2, TILE)),
        statistics=shape((rows, groups, geometry.tiles, 3 if is_packed else 2, TILE)),
        pivots=None if is_packed else shape((rows, geometry.splits, groups)),
    )
    if not save_statistics:
        out_type = out_type._replace(statistics=None, pivots=None)
    out: Outputs = _launch(
        options,
        partial(outputs_kernel, geometry=geometry, eps=options.eps),
        inputs,
        out_type,
        name="timestep_norm_outputs",
        num_splits=geometry.splits,
        has_output=True,
        num_sums=geometry.groups_per_block,
    )
    final_moments = out.final_moments[..., -1]
    return out._replace(final_moments=(final_moments[:, :, 0], final_moments[:, :, 1]))


def run_slopes(
    options: TimestepNormGpuOptions, inputs: KernelInputs, *, first_split: int
) -> Float[Array, "B J G 2"]:
    """Slopes S and T of the splits from `first_split` on."""
    geometry = options.geometry
    num_splits = geometry.splits - first_split
    return _launch(
        options,
        partial(slopes_kernel, geometry=geometry, first_split=first_split),
        inputs,
        jax.ShapeDtypeStruct((geometry.rows, num_splits, geometry.groups, 2), jnp.float32),
        name="timestep_norm_slopes",
        num_splits=num_splits,
    )


def run_gradients(options: TimestepNormGpuOptions, inputs: KernelInputs) -> Gradients:
    """dx, and sums by split for the gradients of all else."""
    geometry, x = options.geometry, inputs.x
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    per_split = geometry.rows, geometry.splits
    sums_at_start = 2 if inputs.documents is None else 4
    out: Gradients = _launch(
        options,
        partial(gradients_kernel, geometry=geometry),
        inputs,
        Gradients(
            dx=jax.ShapeDtypeStruct(x.shape, x.dtype),
            affine=shape((*per_split, 2, x.shape[2])),
            initial=shape((*per_split, geometry.groups, sums_at_start)),
        ),
        name="timestep_norm_gradients",
        num_splits=geometry.splits,
        has_output=True,
        num_sums=2 * geometry.groups_per_block,
    )
    affine = out.affine.sum(axis=(0, 1))
    return out._replace(affine=(affine[0], affine[1]))


def _launch(
    options: TimestepNormGpuOptions,
    kernel: Callable[..., None],
    inputs: KernelInputs,
    out_type: Any,
    *,
    name: str,
    num_splits: int,
    has_output: bool = False,
    num_sums: int = 0,
) -> Any:
    geometry = options.geometry
    blocks = geometry.groups // geometry.groups_per_block
    return mosaic_gpu.launch(
        kernel,
        inputs,
        out_type,
        name=name,
        grid={"g": blocks, "s": num_splits, "b": geometry.rows},
        scratch=kernel_scratch(geometry, inputs, has_output=has_output, num_sums=num_sums),
        interpret=options.interpret,
    )


MOSAIC_GPU_KERNELS = TimestepNormKernels(
    run_moments,
    run_outputs,
    run_slopes,
    run_gradients,
    pack_token_info,
    previous_states,
    next_slopes,
)
