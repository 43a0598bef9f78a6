"""TimestepNorm on Hopper GPUs: padding to whole tiles and groups, and how rows are split."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.common.target import check_hopper, is_interpreted
from pallas_kernels.timestep_norm.mosaic_gpu.context_parallel import Tokens, normalize_part
from pallas_kernels.timestep_norm.mosaic_gpu.launch import (
    Options,
    Pair,
    Rows,
    backward,
    find_rows,
    forward,
)
from pallas_kernels.timestep_norm.mosaic_gpu.pipeline import TOKENS, Geometry
from pallas_kernels.timestep_norm.types import TimestepNormOutput, TimestepNormState

# Features of a group: more do not fit in registers, and wgmma's layout has them by 8, banks by 16.
LARGEST_GROUP = 64
_MULTIPLE = 16
# Warpgroups that the splits of all rows and groups should make: two on each of 132 multiprocessors.
WARPGROUPS = 264
# Tiles of a split at least.
SHORTEST_SPLIT = 4


def timestep_norm(
    x: Float[Array, "B L D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"],
    num_groups: int,
    eps: float,
    state: TimestepNormState,
    prior: TimestepNormState,
    segment_ids: Int32[Array, "B L"] | None,
    *,
    split: int | None = None,
    together: int | None = None,
    sequence_axis: str | None = None,
) -> TimestepNormOutput:
    """The kernels; arguments as in the API, state and prior filled in.

    Lengths that are not a multiple of 128, and groups not of 16 features, are padded in a copy.

    Args:
      x: bfloat16 or float32.
      scale: scale.
      bias: bias.
      num_groups: groups of at most 64 features.
      eps: added to the variance.
      state: before the row.
      prior: before other documents.
      segment_ids: documents.
      split: tokens worked on by one warpgroup, a multiple of 128; a measured choice if None.
      together: groups worked on by one warpgroup, a divisor of all; a measured choice if None.
      sequence_axis: mesh axis over which the sequence is split; the state is the prior then.

    Raises:
      ValueError: another dtype, larger groups, or a device that is no Hopper GPU.
    """
    check_hopper("mosaic_gpu")
    B, L, D = x.shape
    features = D // num_groups
    if x.dtype not in (jnp.bfloat16, jnp.float32) or features > LARGEST_GROUP:
        raise ValueError(
            f"mosaic_gpu takes bfloat16 or float32 and groups of at most {LARGEST_GROUP} features, "
            f"x is {x.dtype} with groups of {features}; use implementation 'xla'"
        )
    missing, narrow = -L % TOKENS, -features % _MULTIPLE
    geometry = _choose_geometry(B, L + missing, num_groups, features, split, together)
    if missing and segment_ids is None:
        segment_ids = jnp.ones((B, L), jnp.int32)
    if segment_ids is not None:
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, missing)))

    widen = partial(_widen, num_groups=num_groups, narrow=narrow)
    wide = widen(jnp.pad(x, ((0, 0), (0, missing), (0, 0))))
    options = Options(eps, geometry, plgpu.InterpretGPUParams() if is_interpreted() else None)
    affine = [widen(a.astype(jnp.float32)) for a in (scale, bias)]
    start = prior.mean, prior.var
    if sequence_axis is None:
        rows = find_rows(geometry, state.count, prior.count, segment_ids, L)
        y, mean, var = _normalize(options, wide, *affine, (state.mean, state.var), start, rows)
        after = TimestepNormState(rows.last_count, mean, var)
    else:
        tokens = Tokens(prior.count, segment_ids)
        y, after = normalize_part(options, sequence_axis, wide, *affine, start, tokens)
    if narrow:
        y = y.reshape(B, -1, num_groups, features + narrow)[..., :features].reshape(B, -1, D)
    return TimestepNormOutput(y[:, :L], after)


def _widen(a: Float[Array, "*B D"], num_groups: int, narrow: int) -> Array:
    """The same with `narrow` features added to every group."""
    if not narrow:
        return a
    groups = a.reshape(*a.shape[:-1], num_groups, -1)
    return jnp.pad(groups, ((0, 0),) * a.ndim + ((0, narrow),)).reshape(*a.shape[:-1], -1)


def is_faster(x: Float[Array, "B L D"], num_groups: int) -> bool:
    """Whether the kernels beat `xla` on a Hopper GPU; not measured for fewer tokens or float32."""
    features = x.shape[2] // num_groups
    is_whole = features <= LARGEST_GROUP and features % _MULTIPLE == 0
    return x.dtype == jnp.bfloat16 and is_whole and x.shape[1] >= TOKENS


def _choose_geometry(
    rows: int, length: int, groups: int, features: int, split: int | None, together: int | None
) -> Geometry:
    width = features + -features % _MULTIPLE
    count = length // TOKENS
    if together is None:
        together = _choose_together(rows, groups, width)
    blocks = rows * groups // together
    if split is None:
        wanted = max(1, WARPGROUPS // blocks)
        each = max(-(-count // min(wanted, count)), min(SHORTEST_SPLIT, count))
    else:
        each = min(split // TOKENS, count)
    return Geometry(rows, count, each, groups, together, features, width)


def _choose_together(rows: int, groups: int, width: int) -> int:
    """Groups of a block: as many as fill lines of the cache, or fewer if then no row is split."""
    choices = [n for n in (4, 2, 1) if n * width <= LARGEST_GROUP and groups % n == 0]
    unsplit = (n for n in choices if 4 * rows * (groups // n) >= 3 * WARPGROUPS)
    return next(unsplit, choices[0])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalize(
    options: Options, x: Array, scale: Array, bias: Array, state: Pair, prior: Pair, rows: Rows
) -> tuple[Array, Array, Array]:
    return forward(options, x, scale, bias, state, prior, rows, with_kept=False)[0]


_normalize.defvjp(partial(forward, with_kept=True), backward)
