"""TimestepNorm by a backend's kernels: padding to whole tiles and groups, and the custom VJP."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values
from jaxtyping import Array, Float, Int32

from pallas_kernels.timestep_norm.row_splits.context_parallel import normalize_shard
from pallas_kernels.timestep_norm.row_splits.documents import RowInfo, describe_rows
from pallas_kernels.timestep_norm.row_splits.passes import backward_pass, forward_pass
from pallas_kernels.timestep_norm.row_splits.types import TILE, TimestepNormGpuOptions
from pallas_kernels.timestep_norm.types import (
    MeanVar,
    TimestepNormOutput,
    TimestepNormState,
    is_known_empty,
)


def normalize_by_splits(
    options: TimestepNormGpuOptions,
    x: Float[Array, "B L D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"],
    initial_state: TimestepNormState,
    prior: TimestepNormState,
    segment_ids: Int32[Array, "B L"] | None,
    sequence_axis: str | None,
) -> TimestepNormOutput:
    """TimestepNorm by the kernels of a backend. Arguments as in `api.py`, with complete states.

    Lengths that are no multiple of 128, and groups of fewer features than `geometry.width`, are
    padded in a copy of x. With `sequence_axis` the initial state is ignored.
    """
    B, L, D = x.shape
    geometry = options.geometry
    num_groups, features = geometry.groups, geometry.features
    token_padding, feature_padding = -L % TILE, geometry.width - features
    if token_padding and segment_ids is None:
        segment_ids = jnp.ones((B, L), jnp.int32)
    if segment_ids is not None:
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, token_padding)))

    pad_groups = partial(_pad_groups, num_groups=num_groups, padding=feature_padding)
    padded = pad_groups(jnp.pad(x, ((0, 0), (0, token_padding), (0, 0))))
    affine = [pad_groups(a.astype(jnp.float32)) for a in (scale, bias)]
    prior_moments = prior.mean, prior.var
    if sequence_axis is None:
        starts_empty = is_known_empty(initial_state) and is_known_empty(prior)
        options = options._replace(starts_empty=starts_empty)
        row_info = describe_rows(options, initial_state.count, prior.count, segment_ids, L)
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


def _pad_groups(a: Float[Array, "*B D"], num_groups: int, padding: int) -> Array:
    """Adds `padding` features to every group."""
    if not padding:
        return a
    groups = a.reshape(*a.shape[:-1], num_groups, -1)
    return jnp.pad(groups, ((0, 0),) * a.ndim + ((0, padding),)).reshape(*a.shape[:-1], -1)


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


def _forward_rule(options, *primals):
    primals = custom_vjp_primal_tree_values(primals)
    return forward_pass(options, *primals, save_statistics=True)


def _backward_rule(options, residuals, cotangents):
    dy, *of_moments = cotangents
    if isinstance(dy, SymbolicZero):
        dy = jnp.zeros_like(residuals.x)
    if all(isinstance(cotangent, SymbolicZero) for cotangent in of_moments):
        return backward_pass(options, residuals, (dy, None, None))
    zeros = jnp.zeros_like(residuals.final_mean)
    d_mean, d_var = (zeros if isinstance(a, SymbolicZero) else a for a in of_moments)
    return backward_pass(options, residuals, (dy, d_mean, d_var))


_normalize.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)
