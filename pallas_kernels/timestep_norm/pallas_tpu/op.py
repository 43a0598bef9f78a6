"""TimestepNorm on TPU: one kernel for each direction, over tiles of a row.

x is read once and y written once, in (B, L, D) layout; README.md has the algorithm and its cost.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.common.residuals import name_residuals
from pallas_kernels.common.target import check_tpu, is_interpreted
from pallas_kernels.timestep_norm.pallas_tpu.backward import run_backward
from pallas_kernels.timestep_norm.pallas_tpu.block_sizes import LANES, choose_blocks
from pallas_kernels.timestep_norm.pallas_tpu.forward import run_forward
from pallas_kernels.timestep_norm.pallas_tpu.layout import TimestepNormTpuPlan
from pallas_kernels.timestep_norm.pallas_tpu.tile_positions import COUNT, position_rows
from pallas_kernels.timestep_norm.types import TimestepNormOutput, TimestepNormState

_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))


def timestep_norm(
    x: Float[Array, "B L D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"],
    num_groups: int,
    eps: float,
    initial_state: TimestepNormState,
    prior: TimestepNormState,
    segment_ids: Int32[Array, "B L"] | None,
    *,
    interpret: bool | pltpu.InterpretParams | None = None,
) -> TimestepNormOutput:
    """The TPU kernels. Arguments as in `api.py`, with complete states.

    `interpret` is that of `pl.pallas_call`; None interprets inside `target.interpreted` only.

    Raises:
      ValueError: x is neither bfloat16 nor float32, 128 tokens of one group do not fit into VMEM,
        or the target is not a TPU.
    """
    plan = _make_plan(x, num_groups, eps, segment_ids is not None, interpret)
    num_rows, length, _ = x.shape
    positions = position_rows(plan, num_rows, initial_state.count, prior.count, segment_ids)
    padded = jnp.pad(x, ((0, 0), (0, max(plan.blocks.tokens - length, 0)), (0, 0)))
    initial_moments = [
        _to_group_rows(plan, jnp.broadcast_to(moment, (num_rows, num_groups)))
        for moment in (*initial_state[1:], *prior[1:])
    ]
    y, final_moments = _normalize(
        plan,
        _pad_groups(plan, padded, num_groups),
        _pad_groups(plan, scale.astype(jnp.float32)[None], num_groups),
        _pad_groups(plan, bias.astype(jnp.float32)[None], num_groups),
        jnp.stack(initial_moments, axis=2),
        positions,
    )
    y = _unpad_groups(plan, y[:, :length], num_groups)
    mean, var = (
        _from_group_rows(plan, final_moments[:, :, i, :, -1], num_groups) for i in range(2)
    )
    if segment_ids is not None:
        has_tokens = (segment_ids != 0).any(axis=1)[:, None]
        mean = jnp.where(has_tokens, mean, initial_state.mean)
        var = jnp.where(has_tokens, var, initial_state.var)
    return TimestepNormOutput(y, TimestepNormState(positions[:, COUNT, -1], mean, var))


def fits_well(x: Float[Array, "B L D"], num_groups: int) -> bool:
    """Whether the kernels accept x, and padding is at most half of the channels they work on."""
    if x.dtype not in _DTYPES:
        return False
    channels = x.shape[2]
    blocks = choose_blocks(x.shape[1], num_groups, channels // num_groups, x.dtype.itemsize)
    return blocks is not None and blocks.padded_groups * blocks.features <= 2 * channels


def _make_plan(
    x: Array,
    num_groups: int,
    eps: float,
    is_packed: bool,
    interpret: bool | pltpu.InterpretParams | None,
) -> TimestepNormTpuPlan:
    if x.dtype not in _DTYPES:
        raise ValueError(
            f"x is {x.dtype}; pallas_tpu takes bfloat16 or float32; use implementation 'xla'"
        )
    interpret = is_interpreted() if interpret is None else interpret
    if not interpret:
        check_tpu("pallas_tpu")
    length, features = x.shape[1], x.shape[2] // num_groups
    blocks = choose_blocks(length, num_groups, features, x.dtype.itemsize)
    if blocks is None:
        raise ValueError(
            f"128 tokens of groups of {features} features ({x.dtype}) do not fit into VMEM; use "
            "implementation 'xla'"
        )
    return TimestepNormTpuPlan(length, features, blocks, is_packed, eps, interpret)


def _pad_groups(plan: TimestepNormTpuPlan, x: Float[Array, "*B D"], num_groups: int) -> Array:
    """Pads groups, and their number, to the sizes that the kernels work on."""
    groups, features = plan.blocks.padded_groups, plan.blocks.features
    if (groups, features) == (num_groups, plan.features):
        return x
    x = x.reshape(*x.shape[:-1], num_groups, plan.features)
    no_padding = ((0, 0),) * (x.ndim - 2)
    x = jnp.pad(x, (*no_padding, (0, groups - num_groups), (0, features - plan.features)))
    return x.reshape(*x.shape[:-2], groups * features)


def _unpad_groups(plan: TimestepNormTpuPlan, x: Float[Array, "*B D"], num_groups: int) -> Array:
    """The reverse of `_pad_groups`."""
    groups, features = plan.blocks.padded_groups, plan.blocks.features
    if (groups, features) == (num_groups, plan.features):
        return x
    x = x.reshape(*x.shape[:-1], groups, features)[..., :num_groups, : plan.features]
    return x.reshape(*x.shape[:-2], num_groups * plan.features)


def _to_group_rows(
    plan: TimestepNormTpuPlan, values: Float[Array, "B G"]
) -> Float[Array, "B S R 128"]:
    """A number for every group in the kernels' layout: in all lanes of the group's row."""
    num_rows, num_groups = values.shape
    groups = plan.blocks.groups
    values = jnp.pad(values, ((0, 0), (0, plan.blocks.padded_groups - num_groups)))
    values = values.reshape(num_rows, plan.channel_steps, groups)
    values = jnp.pad(values, ((0, 0), (0, 0), (0, plan.group_rows - groups)))
    return jnp.broadcast_to(values[..., None], (*values.shape, LANES))


def _from_group_rows(
    plan: TimestepNormTpuPlan, values: Float[Array, "B S R"], num_groups: int
) -> Float[Array, "B G"]:
    """The reverse of `_to_group_rows`, from one lane."""
    flat = values[..., : plan.blocks.groups].reshape(values.shape[0], -1)
    return flat[:, :num_groups]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalize(plan: TimestepNormTpuPlan, x, scale, bias, initial_moments, positions):
    result = run_forward(plan, x, scale, bias, initial_moments, positions, save_statistics=False)
    return result.y, result.final_moments


def _normalize_fwd(plan: TimestepNormTpuPlan, x, scale, bias, initial_moments, positions):
    result = run_forward(plan, x, scale, bias, initial_moments, positions, save_statistics=True)
    result = name_residuals(result, "timestep_norm")
    return (result.y, result.final_moments), (x, scale, result.statistics, positions)


def _normalize_bwd(plan: TimestepNormTpuPlan, residuals, cotangents):
    x, scale, statistics, positions = residuals
    dy, d_final = cotangents
    # Only the last lane of `final_moments` is used, so the others' cotangents are zero.
    d_final = jnp.broadcast_to(d_final[..., -1:], d_final.shape)
    grads = run_backward(plan, x, dy, d_final, scale, statistics, positions)
    return grads.x, grads.scale.sum(axis=0), grads.bias.sum(axis=0), grads.initial_moments, None


_normalize.defvjp(_normalize_fwd, _normalize_bwd)
