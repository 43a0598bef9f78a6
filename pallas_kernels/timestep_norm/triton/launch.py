"""Launches of TimestepNorm's Triton kernels: operands, result shapes, grids."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.common import triton
from pallas_kernels.common.triton_sums import sum_pairs
from pallas_kernels.timestep_norm.row_splits.types import (
    Gradients,
    KernelInputs,
    Outputs,
    TimestepNormGpuOptions,
    TimestepNormKernels,
)
from pallas_kernels.timestep_norm.triton.block_sizes import (
    GRADIENTS_UNROLL,
    MOMENTS_UNROLL,
    OUTPUTS_UNROLL,
    SLOPES_UNROLL,
)
from pallas_kernels.timestep_norm.triton.documents import run_token_info
from pallas_kernels.timestep_norm.triton.state_passing import run_next_slopes, run_previous_states

MODULE = "pallas_kernels.timestep_norm.triton.kernels"


def run_moments(
    options: TimestepNormGpuOptions, inputs: KernelInputs, num_splits: int
) -> Float[Array, "B J G 4"]:
    """Summaries of the first `num_splits` splits: count, pivot, offset of the mean, squares."""
    geometry = options.geometry
    (summaries,) = _launch(
        "timestep_norm_moments",
        options,
        [inputs.x, _token_info(inputs), geometry.tiles, geometry.tiles_per_split],
        [_float32(geometry.rows, num_splits, geometry.groups, 4)],
        num_splits,
        {
            "EACH": 1 / geometry.features,
            "NUM_SPLITS": num_splits,
            "PACKED": inputs.documents is not None,
            "UNROLL": MOMENTS_UNROLL,
        },
    )
    return summaries


def run_outputs(
    options: TimestepNormGpuOptions, inputs: KernelInputs, *, save_statistics: bool
) -> Outputs:
    """y and the final moments; with `save_statistics` what the backward pass needs."""
    geometry, x, documents = options.geometry, inputs.x, inputs.documents
    rows, groups = geometry.rows, geometry.groups
    num_statistics = 2 if documents is None else 3
    initial = has_initial = x
    if documents is not None and not options.starts_empty:
        initial, has_initial = documents.initial, documents.has_initial
    length = geometry.tiles * 128
    saved = [
        _float32(rows, length, num_statistics, groups),
        _float32(rows, geometry.splits, groups),
    ]
    moments = _float32(rows, groups)
    y, mean, var, statistics, pivots = _launch(
        "timestep_norm_outputs",
        options,
        [
            x,
            inputs.scale,
            inputs.bias,
            inputs.previous_states,
            _initial_count(options, inputs),
            _token_info(inputs),
            initial,
            has_initial,
            geometry.tiles,
            geometry.tiles_per_split,
            geometry.splits,
        ],
        [
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            moments,
            moments,
            *(saved if save_statistics else [_float32(1), _float32(1)]),
        ],
        geometry.splits,
        {
            "EACH": 1 / geometry.features,
            "EPS": options.eps,
            "PACKED": documents is not None,
            "STARTS_EMPTY": options.starts_empty,
            "SAVE": save_statistics,
            "STATISTICS": num_statistics,
            "UNROLL": OUTPUTS_UNROLL,
        },
    )
    if not save_statistics:
        return Outputs(y, (mean, var), None, None)
    return Outputs(y, (mean, var), statistics, pivots)


def run_slopes(
    options: TimestepNormGpuOptions, inputs: KernelInputs, *, first_split: int
) -> Float[Array, "B J G 2"]:
    """Slopes S and T of the splits from `first_split` on."""
    geometry = options.geometry
    num_slopes = geometry.splits - first_split
    (slopes,) = _launch(
        "timestep_norm_slopes",
        options,
        [
            *_backward_operands(options, inputs),
            geometry.tiles,
            geometry.tiles_per_split,
            geometry.splits,
        ],
        [_float32(geometry.rows, num_slopes, geometry.groups, 2)],
        num_slopes,
        {
            "FIRST_SPLIT": first_split,
            "NUM_SLOPES": num_slopes,
            "PACKED": inputs.documents is not None,
            "STARTS_EMPTY": options.starts_empty,
            "STATISTICS": inputs.statistics.shape[2],
            "UNROLL": SLOPES_UNROLL,
        },
    )
    return slopes


def run_gradients(options: TimestepNormGpuOptions, inputs: KernelInputs) -> Gradients:
    """dx, and sums for the gradients of all else."""
    geometry, x = options.geometry, inputs.x
    is_packed = inputs.documents is not None
    operands = _backward_operands(options, inputs)
    operands.insert(5, inputs.next_slopes)
    per_split = geometry.rows, geometry.splits
    dx, affine, initial = _launch(
        "timestep_norm_gradients",
        options,
        [*operands, geometry.tiles, geometry.tiles_per_split, geometry.splits],
        [
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            _float32(*per_split, 2, x.shape[2]),
            _float32(*per_split, geometry.groups, 4 if is_packed else 2),
        ],
        geometry.splits,
        {
            "EACH": 1 / geometry.features,
            "PACKED": is_packed,
            "STARTS_EMPTY": options.starts_empty,
            "STATISTICS": inputs.statistics.shape[2],
            "UNROLL": GRADIENTS_UNROLL,
        },
    )
    affine = affine.reshape(-1, 2, x.shape[2])
    return Gradients(dx, sum_pairs(affine, interpret=options.interpret), initial)


TRITON_KERNELS = TimestepNormKernels(
    run_moments,
    run_outputs,
    run_slopes,
    run_gradients,
    run_token_info,
    run_previous_states,
    run_next_slopes,
)


def _backward_operands(options: TimestepNormGpuOptions, inputs: KernelInputs) -> list[Array]:
    return [
        inputs.x,
        inputs.dy,
        inputs.scale,
        inputs.statistics,
        inputs.pivots,
        _initial_count(options, inputs),
        _token_info(inputs),
    ]


def _initial_count(options: TimestepNormGpuOptions, inputs: KernelInputs) -> Array:
    """The kernels do not read it in rows that are packed, or that start from nothing."""
    is_read = inputs.documents is None and not options.starts_empty
    return inputs.initial_count if is_read else inputs.x


def _token_info(inputs: KernelInputs) -> Array:
    """The kernels do not read it in rows that are not packed."""
    return inputs.x if inputs.documents is None else inputs.documents.token_info


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _launch(
    name: str,
    options: TimestepNormGpuOptions,
    operands: list[Array | int],
    out_type: list[jax.ShapeDtypeStruct],
    num_splits: int,
    constants: dict[str, Any],
) -> list[Array]:
    geometry = options.geometry
    kernels = triton.load_kernels(MODULE, interpret=options.interpret)
    block = 1 << (geometry.features - 1).bit_length()
    return triton.launch(
        getattr(kernels, name),
        operands,
        out_type,
        grid=(geometry.groups // geometry.groups_per_block, num_splits, geometry.rows),
        constants={
            "GROUPS": geometry.groups,
            "GB": geometry.groups_per_block,
            "F": block,
            "WIDTH": geometry.width,
            "FEATURES": geometry.features,
            "D": geometry.groups * geometry.width,
            **constants,
        },
        num_warps=max(1, geometry.groups_per_block * block // 256),
        interpret=options.interpret,
    )
