"""TimestepNorm on Hopper GPUs: padding to whole tiles and groups, and the custom VJP."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.common.mosaic_gpu import interpret_params
from pallas_kernels.common.target import check_hopper_or_blackwell
from pallas_kernels.timestep_norm.mosaic_gpu.block_sizes import (
    FEATURE_MULTIPLE,
    MAX_GROUP_FEATURES,
    SHARED_MEMORY,
    choose_geometry,
)
from pallas_kernels.timestep_norm.mosaic_gpu.context_parallel import normalize_shard
from pallas_kernels.timestep_norm.mosaic_gpu.documents import RowInfo, describe_rows
from pallas_kernels.timestep_norm.mosaic_gpu.launch import TimestepNormGpuOptions
from pallas_kernels.timestep_norm.mosaic_gpu.layout import TILE
from pallas_kernels.timestep_norm.mosaic_gpu.passes import backward_pass, forward_pass
from pallas_kernels.timestep_norm.types import MeanVar, TimestepNormOutput, TimestepNormState


def timestep_norm(
    x: Float[Array, "B L D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"],
    num_groups: int,
    eps: float,
    initial_state: TimestepNormState,
    prior: TimestepNormState,
    segment_ids: Int32[Array, "B L"] | None,
    sequence_axis: str | None = None,
    *,
    split: int | None = None,
    groups_per_block: int | None = None,
) -> TimestepNormOutput:
    """The Hopper kernels. Arguments as in `api.py`, with complete states.

    Lengths that are no multiple of 128, and groups of no multiple of 16 features, are padded in a
    copy of x. With `sequence_axis` the initial state is ignored.

    `split` is the number of tokens that one warpgroup works on, a multiple of 128, and
    `groups_per_block` the number of groups, a divisor of `num_groups`; None for measured choices.

    Raises:
      ValueError: another dtype, larger groups, or a target that is not a Hopper GPU.
    """
    check_hopper_or_blackwell("mosaic_gpu", shared_memory=SHARED_MEMORY)
    B, L, D = x.shape
    features = D // num_groups
    _check_supported(x, features)
    token_padding, feature_padding = -L % TILE, -features % FEATURE_MULTIPLE
    geometry = choose_geometry(
        B, L + token_padding, num_groups, features, split=split, groups_per_block=groups_per_block
    )
    options = TimestepNormGpuOptions(eps, geometry, interpret_params())
    if token_padding and segment_ids is None:
        segment_ids = jnp.ones((B, L), jnp.int32)
    if segment_ids is not None:
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, token_padding)))

    pad_groups = partial(_pad_groups, num_groups=num_groups, padding=feature_padding)
    padded = pad_groups(jnp.pad(x, ((0, 0), (0, token_padding), (0, 0))))
    affine = [pad_groups(a.astype(jnp.float32)) for a in (scale, bias)]
    prior_moments = prior.mean, prior.var
    if sequence_axis is None:
        row_info = describe_rows(geometry, initial_state.count, prior.count, segment_ids, L)
        initial = initial_state.mean, initial_state.var
        y, mean, var = _normalize(options, padded, *affine, initial, prior_moments, row_info)
        final_state = TimestepNormState(row_info.final_count, mean, var)
    else:
        y, final_state = normalize_shard(
            options, sequence_axis, padded, *affine, prior_moments, prior.count, segment_ids
        )
    if feature_padding:
        y = y.reshape(B, -1, num_groups, features + feature_padding)
        y = y[..., :features].reshape(B, -1, D)
    return TimestepNormOutput(y[:, :L], final_state)


def _check_supported(x: Array, features: int) -> None:
    if x.dtype not in (jnp.bfloat16, jnp.float32) or features > MAX_GROUP_FEATURES:
        raise ValueError(
            "mosaic_gpu takes bfloat16 or float32 and groups of at most "
            f"{MAX_GROUP_FEATURES} features, x is {x.dtype} with groups of {features}; use "
            "implementation 'xla'"
        )


def _pad_groups(a: Float[Array, "*B D"], num_groups: int, padding: int) -> Array:
    """Adds `padding` features to every group."""
    if not padding:
        return a
    groups = a.reshape(*a.shape[:-1], num_groups, -1)
    return jnp.pad(groups, ((0, 0),) * a.ndim + ((0, padding),)).reshape(*a.shape[:-1], -1)


def is_faster(x: Float[Array, "B L D"], num_groups: int) -> bool:
    """Whether the kernels beat `xla` on a Hopper GPU; not measured for fewer tokens or float32."""
    features = x.shape[2] // num_groups
    is_supported = features <= MAX_GROUP_FEATURES and features % FEATURE_MULTIPLE == 0
    return x.dtype == jnp.bfloat16 and is_supported and x.shape[1] >= TILE


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalize(
    options: TimestepNormGpuOptions,
    x: Array,
    scale: Array,
    bias: Array,
    initial: MeanVar,
    prior: MeanVar,
    row_info: RowInfo,
) -> tuple[Array, Array, Array]:
    return forward_pass(options, x, scale, bias, initial, prior, row_info, save_statistics=False)[0]


_normalize.defvjp(partial(forward_pass, save_statistics=True), backward_pass)
