"""TimestepNorm on Hopper GPUs over a sequence that is split over devices.

The kernels sum up what every split hands on; a part's own sum goes to the other devices once, and
the outputs start from what comes in. Backward a part's gradients of the moments before it go to the
parts before, for which they are gradients of the moments after. So nothing reads x but the kernels.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.common import context_parallel
from pallas_kernels.timestep_norm.context_parallel import Links, enter, enter_backward
from pallas_kernels.timestep_norm.mosaic_gpu.forward import Inputs
from pallas_kernels.timestep_norm.mosaic_gpu.launch import (
    Kept,
    Options,
    Pair,
    Rows,
    add_slopes,
    backward,
    describe_documents,
    find_rows,
    forward,
    inputs_backward,
    merge_splits,
    run_moments,
    run_slopes,
    slopes_at_end,
    times,
)
from pallas_kernels.timestep_norm.types import TimestepNormState


class Tokens(NamedTuple):
    """Integers of a part: tokens that a document starts from, and documents, None if one."""

    prior_count: Int32[Array, ""]
    segment_ids: Int32[Array, "B L"] | None


class _KeptPart(NamedTuple):
    """What the backward pass needs of the forward pass."""

    kept: Kept
    state: TimestepNormState
    prior: TimestepNormState
    links: Links


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def normalize_part(
    options: Options,
    axis: str,
    x: Float[Array, "B L D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"],
    prior: Pair,
    tokens: Tokens,
) -> tuple[Array, TimestepNormState]:
    """y of this device's tokens, inside `jax.shard_map`, and the moments after them.

    Args:
      options: static choices.
      axis: mesh axis over which the sequence is split.
      x: this device's tokens, whole tiles of them.
      scale: float32.
      bias: float32.
      prior: mean and variance that every document starts from.
      tokens: from how many tokens, and the documents.
    """
    return _forward(options, axis, x, scale, bias, prior, tokens, with_kept=False)[0]


def _forward(options, axis, x, scale, bias, prior, tokens, *, with_kept):
    geometry = options.geometry
    B, L, _ = x.shape
    part = context_parallel.local_documents(tokens.segment_ids, B, L)
    find = partial(find_rows, geometry, segment_ids=tokens.segment_ids, length=L)
    # What this part adds up, as if every row began in it with nothing.
    rows = find(jnp.zeros(B, jnp.int32), tokens.prior_count)
    nothing = jnp.zeros((B, geometry.groups), jnp.float32)
    documents = describe_documents(rows, (nothing, nothing), prior)
    inputs = Inputs(x, documents, rows.state_count)
    summaries = run_moments(options, inputs, geometry.splits)
    start = TimestepNormState(tokens.prior_count, *prior)
    state, links = enter(part, *_own_moments(summaries, rows), start, axis)
    rows = find(state.count, tokens.prior_count)
    (y, mean, var), kept = forward(
        options, x, scale, bias, (state.mean, state.var), prior, rows,
        with_kept=with_kept, summaries=summaries,
    )  # fmt: skip
    after = TimestepNormState(rows.last_count, mean, var)
    return (y, after), _KeptPart(kept, state, start, links)


def _backward(options, axis, kept_part, cotangents):
    kept, state, prior, links = kept_part
    dy, (_, d_mean, d_var) = cotangents
    slopes = run_slopes(options, inputs_backward(kept, dy), first_split=0)
    before = _before_first_token(slopes, d_mean, d_var, kept, state)
    more_mean, more_var = enter_backward(links, prior, *before, axis)
    dx, d_scale, d_bias, d_state, d_prior, _ = backward(
        options, kept, (dy, d_mean + more_mean, d_var + more_var), slopes=slopes
    )
    # Its first document has no tokens in the parts before.
    is_fresh = (state.count == prior.count)[:, None]
    d_prior = tuple(
        of_later + jnp.where(is_fresh, of_first, 0).sum(axis=0)
        for of_later, of_first in zip(d_prior, d_state, strict=True)
    )
    return dx, d_scale, d_bias, d_prior, None


normalize_part.defvjp(partial(_forward, with_kept=True), _backward)


def _own_moments(summaries: Float[Array, "B S G 4"], rows: Rows) -> Pair:
    """Mean and variance of the row's last document in this part."""
    B, splits, groups, _ = summaries.shape
    is_last = jnp.ones((B, splits), bool) if rows.links is None else rows.links.last
    nothing = jnp.zeros((B, 1, groups), jnp.float32)
    n, pivot, sums, squares = merge_splits(
        nothing[..., :1], nothing, nothing, summaries, is_last[:, None]
    )
    each = 1 / jnp.maximum(n, 1)
    return (pivot + sums * each)[:, 0], (squares * each)[:, 0]


def _before_first_token(
    slopes: Float[Array, "B S G 2"],
    d_mean: Float[Array, "B G"],
    d_var: Float[Array, "B G"],
    kept: Kept,
    state: TimestepNormState,
) -> Pair:
    """Gradients of the moments before this part, from this part's outputs and last moments."""
    rows, pivot = kept.rows, state.mean[:, None]
    s, t = slopes_at_end(pivot, d_mean, d_var, kept)
    begins = jnp.ones(slopes.shape[:2], bool)
    if rows.links is not None:
        ends, begins = rows.links.first[:, None, -1:], rows.links.first[:, :-1]
        s, t = jnp.where(ends, s, 0), jnp.where(ends, t, 0)
    sums = add_slopes((s, t), pivot, slopes, kept.entering[..., 0], begins[:, None])
    count = state.count[:, None].astype(jnp.float32)
    before_var, before_mean = (times(count, total[:, 0]) for total in sums)
    if rows.some is None:
        return before_mean, before_var
    some = rows.some[:, None]
    return jnp.where(some, before_mean, d_mean), jnp.where(some, before_var, d_var)
