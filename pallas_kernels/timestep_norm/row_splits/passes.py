"""Both passes over rows: the kernels, and the states that splits pass between two of them."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.common.residuals import name_residuals
from pallas_kernels.timestep_norm.row_splits.documents import RowInfo, kernel_documents
from pallas_kernels.timestep_norm.row_splits.state_passing import (
    FinalStateGradients,
    multiply_by_count,
)
from pallas_kernels.timestep_norm.row_splits.types import (
    KernelInputs,
    TimestepNormDocuments,
    TimestepNormGpuOptions,
)
from pallas_kernels.timestep_norm.types import MeanVar


class TimestepNormResiduals(NamedTuple):
    """Values saved by the forward pass for the backward pass; see `KernelInputs`.

    Attributes:
      x: the input.
      scale: scale.
      bias: bias.
      row_info: counts and documents.
      documents: the kernels' form of them.
      previous_states: pivot, sum around it and squares before every split.
      final_mean: mean after every row's last token.
      statistics: offset, r and, in packed rows, pivot of every token.
      pivots: pivot of every split, in rows that are not packed.
    """

    x: Float[Array, "B L D"]
    scale: Float[Array, " D"]
    bias: Float[Array, " D"]
    row_info: RowInfo
    documents: TimestepNormDocuments | None
    previous_states: Float[Array, "B S G 3"]
    final_mean: Float[Array, "B G"]
    statistics: Array
    pivots: Float[Array, "B S G"] | None


def forward_pass(
    options: TimestepNormGpuOptions,
    x: Float[Array, "B L D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"],
    initial: MeanVar,
    prior: MeanVar,
    row_info: RowInfo,
    *,
    save_statistics: bool,
    summaries: Float[Array, "B S G 4"] | None = None,
) -> tuple[tuple[Array, Array, Array], TimestepNormResiduals]:
    """y, and mean and variance after every row.

    Args:
      options: static choices.
      x: input, whole tiles of it.
      scale: float32.
      bias: float32.
      initial: mean and variance (B, G) before the row.
      prior: mean and variance (G,) before later documents.
      row_info: counts and documents.
      save_statistics: whether a backward pass follows.
      summaries: of all splits, from the kernels; None computes those that are needed.
    """
    num_splits = options.geometry.splits
    documents = kernel_documents(row_info, initial, prior)
    inputs = KernelInputs(x, documents, row_info.initial_count, scale, bias)
    if num_splits == 1:
        summaries = None
    elif summaries is None:
        summaries = options.kernels.moments(options, inputs, num_splits - 1)
    else:
        summaries = summaries[:, :-1]
    states = options.kernels.previous_states(options, summaries, initial, prior, row_info)
    inputs = inputs._replace(previous_states=states)
    out = options.kernels.outputs(options, inputs, save_statistics=save_statistics)
    states, out = name_residuals((states, out), "timestep_norm")
    mean, var = out.final_moments
    residuals = TimestepNormResiduals(
        x, scale, bias, row_info, documents, states, mean, out.statistics, out.pivots
    )
    if row_info.has_tokens is not None:
        mean = jnp.where(row_info.has_tokens[:, None], mean, initial[0])
        var = jnp.where(row_info.has_tokens[:, None], var, initial[1])
    return (out.y, mean, var), residuals


def backward_inputs(residuals: TimestepNormResiduals, dy: Float[Array, "B L D"]) -> KernelInputs:
    """Operands of the backward kernels."""
    return KernelInputs(
        residuals.x,
        residuals.documents,
        residuals.row_info.initial_count,
        residuals.scale,
        dy=dy,
        statistics=residuals.statistics,
        pivots=residuals.pivots,
    )


def backward_pass(
    options: TimestepNormGpuOptions,
    residuals: TimestepNormResiduals,
    cotangents: tuple[Array, Array | None, Array | None],
    *,
    slopes: Float[Array, "B S G 2"] | None = None,
) -> tuple[Array, Array, Array, MeanVar, MeanVar, None]:
    """Gradients of `forward_pass`'s array arguments.

    Args:
      options: static choices.
      residuals: from `forward_pass` with `save_statistics`.
      cotangents: of y, and of mean and variance after every row; None where they are 0.
      slopes: of all splits, from the kernels; None computes those that are needed.
    """
    dy, d_mean, d_var = cotangents
    row_info, geometry = residuals.row_info, options.geometry
    inputs = backward_inputs(residuals, dy)
    if geometry.splits == 1:
        slopes = None
    elif slopes is None:
        slopes = options.kernels.slopes(options, inputs, first_split=1)
    else:
        slopes = slopes[:, 1:]
    pivots = _last_pivots(residuals, geometry.tiles_per_split, geometry.splits)
    final = None
    if d_mean is not None and d_var is not None:
        final = FinalStateGradients(d_mean, d_var, residuals.final_mean)
    after = options.kernels.next_slopes(
        options, slopes, pivots, residuals.previous_states, final, row_info
    )
    out = options.kernels.gradients(options, inputs._replace(next_slopes=after))
    d_initial, d_prior = _initial_gradients(out.initial, d_mean, d_var, row_info)
    return out.dx, *out.affine, d_initial, d_prior, None


def _last_pivots(
    residuals: TimestepNormResiduals, tiles_per_split: int, num_splits: int
) -> Float[Array, "B S G"]:
    """The pivot of the last token of every split."""
    if residuals.pivots is not None:
        return residuals.pivots
    statistics = residuals.statistics
    last_tiles = statistics[:, :, tiles_per_split - 1 :: tiles_per_split, 2, -1]
    if last_tiles.shape[2] < num_splits:
        last_tiles = jnp.concatenate([last_tiles, statistics[:, :, -1:, 2, -1]], axis=2)
    return jnp.swapaxes(last_tiles, 1, 2)


def _initial_gradients(
    slopes_at_start: Float[Array, "B S G C"],
    d_mean: Float[Array, "B G"] | None,
    d_var: Float[Array, "B G"] | None,
    row_info: RowInfo,
) -> tuple[MeanVar, MeanVar]:
    """Gradients of the moments before the row and of the prior's.

    Args:
      slopes_at_start: see `Gradients.initial`.
      d_mean: cotangent of the mean after the row; in rows of padding alone that of the mean before.
        None: 0.
      d_var: likewise.
      row_info: counts and documents.
    """
    initial_count = row_info.initial_count[:, None].astype(jnp.float32)
    if row_info.has_tokens is None:
        s, t = slopes_at_start[:, 0, :, 0], slopes_at_start[:, 0, :, 1]
        d_initial = multiply_by_count(initial_count, t), multiply_by_count(initial_count, s)
        return d_initial, (jnp.zeros_like(s[0]), jnp.zeros_like(s[0]))
    s, t, later_s, later_t = (slopes_at_start[..., j].sum(axis=1) for j in range(4))
    d_initial = multiply_by_count(initial_count, t), multiply_by_count(initial_count, s)
    if d_mean is not None and d_var is not None:
        is_padding_row = ~row_info.has_tokens[:, None]
        d_initial = (
            d_initial[0] + jnp.where(is_padding_row, d_mean, 0),
            d_initial[1] + jnp.where(is_padding_row, d_var, 0),
        )
    prior_count = row_info.prior_count.astype(jnp.float32)
    d_prior = (
        multiply_by_count(prior_count, later_t.sum(0)),
        multiply_by_count(prior_count, later_s.sum(0)),
    )
    return d_initial, d_prior
