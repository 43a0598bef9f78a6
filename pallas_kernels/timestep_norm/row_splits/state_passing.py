"""States that the splits of a row pass to each other: moments forward, slopes backward.

A split's summary of moments is its token count, a pivot, the offset of its mean from the pivot, and
the squares around its mean. A split's slopes S and T (backward.py) are around its own pivot.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.timestep_norm.row_splits.documents import RowInfo
from pallas_kernels.timestep_norm.row_splits.types import TimestepNormGpuOptions
from pallas_kernels.timestep_norm.types import MeanVar

Slopes = tuple[Float[Array, "B T G"], Float[Array, "B T G"]]


class MergedMoments(NamedTuple):
    """Moments of T merged states.

    Attributes:
      count: tokens.
      pivot: mean up to its rounding.
      total: sum over tokens of the difference between a token's mean and the pivot.
      squares: sum over tokens of squares around the mean; count * variance.
    """

    count: Float[Array, "B T G"]
    pivot: Float[Array, "B T G"]
    total: Float[Array, "B T G"]
    squares: Float[Array, "B T G"]


class FinalStateGradients(NamedTuple):
    """Gradients of the moments after a row, which its tokens' gradients contain.

    Attributes:
      d_mean: cotangent of the mean after the row.
      d_var: cotangent of the variance.
      mean: the mean.
    """

    d_mean: Float[Array, "B G"]
    d_var: Float[Array, "B G"]
    mean: Float[Array, "B G"]


def previous_states(
    options: TimestepNormGpuOptions,
    summaries: Float[Array, "B J G 4"] | None,
    initial: MeanVar,
    prior: MeanVar,
    row_info: RowInfo,
) -> Float[Array, "B S G 3"]:
    """Pivot, sum around it and squares before every split.

    They belong to the document that the split before ended in: the state that the document started
    from, merged with its tokens in all splits before.

    Args:
      options: static choices.
      summaries: of all splits but the last; None for a single split.
      initial: mean and variance (B, G) before the row.
      prior: mean and variance (G,) before later documents.
      row_info: counts and documents.
    """
    number = jnp.arange(options.geometry.splits)
    count = row_info.initial_count[:, None, None].astype(jnp.float32)
    mean, var = (jnp.broadcast_to(m[:, None], (m.shape[0], 1, m.shape[1])) for m in initial)
    is_counted = (number[:-1] < number[:, None])[None]
    if row_info.connectivity is not None:
        later = row_info.connectivity.continues_later[..., None]
        count = jnp.where(later, row_info.prior_count.astype(jnp.float32), count)
        mean, var = jnp.where(later, prior[0], mean), jnp.where(later, prior[1], var)
        is_counted = row_info.connectivity.feeds_forward
    if summaries is None:
        return jnp.stack([mean, jnp.zeros_like(mean), count * var], axis=-1)
    merged = merge_splits(count, mean, var, summaries, is_counted)
    return jnp.stack([merged.pivot, merged.total, merged.squares], axis=-1)


def merge_splits(
    count: Float[Array, "B T 1"],
    mean: Float[Array, "B T G"],
    var: Float[Array, "B T G"],
    summaries: Float[Array, "B J G 4"],
    is_counted: Bool[Array, "B T J"],
) -> MergedMoments:
    """Merges each of T states with the splits that `is_counted` selects: Chan's rule.

    Args:
      count: tokens of every state.
      mean: mean of every state.
      var: variance of every state.
      summaries: summaries of splits.
      is_counted: which of J splits a state is merged with.
    """
    mask = is_counted[..., None]
    # (B, 1, J, G) each.
    tokens, split_pivot, offset, split_squares = (summaries[:, None, ..., j] for j in range(4))

    def sum_counted(values):
        return jnp.where(mask, values, 0).sum(axis=2)

    all_tokens = count + sum_counted(tokens)
    each = 1 / jnp.maximum(all_tokens, 1)
    pivot = (count * mean + sum_counted(tokens * (split_pivot + offset))) * each
    pivot = jnp.where(all_tokens == count, mean, pivot)
    # The pivot is the mean but for rounding, so that the squares around both are nearly the same.
    from_pivot = (split_pivot - pivot[:, :, None]) + offset
    sums = count * (mean - pivot) + sum_counted(tokens * from_pivot)
    squares = count * (var + jnp.square(mean - pivot)) + sum_counted(
        split_squares + tokens * jnp.square(from_pivot)
    )
    squares = jnp.maximum(squares - sums * (sums * each), 0)
    return MergedMoments(all_tokens, pivot, sums, squares)


def next_slopes(
    options: TimestepNormGpuOptions,
    slopes: Float[Array, "B J G 2"] | None,
    pivots: Float[Array, "B S G"],
    states: Float[Array, "B S G 3"],
    final: FinalStateGradients | None,
    row_info: RowInfo,
) -> Float[Array, "B S G 2"]:
    """S and T after every split: of later splits and of the final state.

    Args:
      options: static choices.
      slopes: of all splits but the first; None for a single split.
      pivots: pivot of the last token of every split.
      states: from `previous_states`; `slopes` are around their pivots.
      final: gradients of the final state; None if they are 0.
      row_info: counts and documents.
    """
    del options
    s = t = jnp.zeros_like(pivots)
    if final is not None:
        s, t = final_state_slopes(
            pivots, final.d_mean, final.d_var, final.mean, row_info.final_count
        )
    if slopes is None:
        return jnp.stack([s, t], axis=-1)
    number = jnp.arange(pivots.shape[1])
    is_counted = (number[:, None] < number[1:])[None]
    if row_info.connectivity is not None:
        feeds_backward = row_info.connectivity.feeds_backward
        is_counted = is_counted & feeds_backward[..., :-1]
        reaches_end = feeds_backward[..., -1:]
        s, t = jnp.where(reaches_end, s, 0), jnp.where(reaches_end, t, 0)
    first_pivots = states[:, 1:, :, 0]
    return jnp.stack(add_slopes((s, t), pivots, slopes, first_pivots, is_counted), axis=-1)


def final_state_slopes(
    pivot: Float[Array, "B T G"],
    d_mean: Float[Array, "B G"],
    d_var: Float[Array, "B G"],
    final_mean: Float[Array, "B G"],
    final_count: Int32[Array, " B"],
) -> Slopes:
    """S and T, around each pivot, of the gradients of the moments after the row's last token."""
    each = 1 / jnp.maximum(final_count, 1).astype(jnp.float32)[:, None, None]
    s = d_var[:, None] * each
    t = d_mean[:, None] * each - 2 * (final_mean[:, None] - pivot) * s
    return jnp.broadcast_to(s, t.shape), t


def add_slopes(
    sums: Slopes,
    pivot: Float[Array, "B T G"],
    slopes: Float[Array, "B J G 2"],
    split_pivots: Float[Array, "B J G"],
    is_counted: Bool[Array, "B T J"],
) -> Slopes:
    """S and T around `pivot`, with those of the counted splits, which are around `split_pivots`."""
    mask = is_counted[..., None]
    split_s, split_t = slopes[:, None, ..., 0], slopes[:, None, ..., 1]
    split_t = split_t - 2 * (split_pivots[:, None] - pivot[:, :, None]) * split_s
    return (
        sums[0] + jnp.where(mask, split_s, 0).sum(axis=2),
        sums[1] + jnp.where(mask, split_t, 0).sum(axis=2),
    )


def multiply_by_count(count: Float[Array, "..."], sums: Float[Array, "..."]) -> Float[Array, "..."]:
    """count * sums; 0 where count is 0, even if the sum is not finite."""
    return jnp.where(count > 0, count * sums, 0)
