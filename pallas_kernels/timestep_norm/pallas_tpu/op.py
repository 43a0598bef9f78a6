"""TimestepNorm on TPU: one kernel forward and one backward, over tiles of a row.

x is read once and y written once, in (B, L, D) layout; README.md has the algorithm and its cost.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.common.residuals import name_residuals
from pallas_kernels.common.target import check_tpu, is_interpreted
from pallas_kernels.timestep_norm.pallas_tpu.backward import differentiate
from pallas_kernels.timestep_norm.pallas_tpu.block_sizes import LANES, choose_blocks
from pallas_kernels.timestep_norm.pallas_tpu.forward import normalize
from pallas_kernels.timestep_norm.pallas_tpu.layout import COUNT, Plan, find_places
from pallas_kernels.timestep_norm.types import TimestepNormOutput, TimestepNormState

_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))


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
    interpret: bool | pltpu.InterpretParams | None = None,
) -> TimestepNormOutput:
    """Kernels for TPU. Arguments as in the API, state and prior filled in.

    `interpret` runs the kernels without a TPU, see `pallas_call`; None: inside
    `target.interpreted`.

    Raises:
      ValueError: x is neither bfloat16 nor float32, groups so wide that 128 tokens of one do not
        fit into a core's memory, or no TPU.
    """
    plan = _make_plan(x, num_groups, eps, segment_ids is not None, interpret)
    rows, length, _ = x.shape
    places = find_places(plan, rows, state.count, prior.count, segment_ids)
    padded = jnp.pad(x, ((0, 0), (0, max(plan.blocks.tokens - length, 0)), (0, 0)))
    parts = [
        _spread(plan, jnp.broadcast_to(part, (rows, num_groups)))
        for part in (*state[1:], *prior[1:])
    ]
    y, last = _normalize(
        plan,
        _pad_groups(plan, padded, num_groups),
        _pad_groups(plan, scale.astype(jnp.float32)[None], num_groups),
        _pad_groups(plan, bias.astype(jnp.float32)[None], num_groups),
        jnp.stack(parts, axis=2),
        places,
    )
    y = _cut_groups(plan, y[:, :length], num_groups)
    mean, var = (_gather(plan, last[:, :, i, :, -1], num_groups) for i in range(2))
    if segment_ids is not None:
        some = (segment_ids != 0).any(axis=1)[:, None]
        mean, var = jnp.where(some, mean, state.mean), jnp.where(some, var, state.var)
    return TimestepNormOutput(y, TimestepNormState(places[:, COUNT, -1], mean, var))


def fits_well(x: Float[Array, "B L D"], num_groups: int) -> bool:
    """Whether the kernels take x, and do not work on more padding than channels."""
    if x.dtype not in _DTYPES:
        return False
    channels = x.shape[2]
    blocks = choose_blocks(x.shape[1], num_groups, channels // num_groups, x.dtype.itemsize)
    return blocks is not None and blocks.padded_groups * blocks.features <= 2 * channels


def _make_plan(
    x: Array,
    num_groups: int,
    eps: float,
    packed: bool,
    interpret: bool | pltpu.InterpretParams | None,
) -> Plan:
    if x.dtype not in _DTYPES:
        raise ValueError(
            f"x is {x.dtype}; pallas_tpu takes bfloat16 and float32, 'xla' and 'reference' the rest"
        )
    interpret = is_interpreted() if interpret is None else interpret
    if not interpret:
        check_tpu("pallas_tpu")
    length, features = x.shape[1], x.shape[2] // num_groups
    blocks = choose_blocks(length, num_groups, features, x.dtype.itemsize)
    if blocks is None:
        raise ValueError(
            f"groups of {features} features ({x.dtype}) do not fit into a TPU core's memory; use "
            "implementation 'xla'"
        )
    return Plan(length, features, blocks, packed, eps, interpret)


def _pad_groups(plan: Plan, x: Float[Array, "*B D"], num_groups: int) -> Array:
    """Fills groups, and their number, up to what the kernels work on."""
    groups, features = plan.blocks.padded_groups, plan.blocks.features
    if (groups, features) == (num_groups, plan.features):
        return x
    x = x.reshape(*x.shape[:-1], num_groups, plan.features)
    missing = ((0, 0),) * (x.ndim - 2)
    x = jnp.pad(x, (*missing, (0, groups - num_groups), (0, features - plan.features)))
    return x.reshape(*x.shape[:-2], groups * features)


def _cut_groups(plan: Plan, x: Float[Array, "*B D"], num_groups: int) -> Array:
    """The reverse of `_pad_groups`."""
    groups, features = plan.blocks.padded_groups, plan.blocks.features
    if (groups, features) == (num_groups, plan.features):
        return x
    x = x.reshape(*x.shape[:-1], groups, features)[..., :num_groups, : plan.features]
    return x.reshape(*x.shape[:-2], num_groups * plan.features)


def _spread(plan: Plan, values: Float[Array, "B G"]) -> Float[Array, "B S R 128"]:
    """A number for every group as the kernels read it: in all lanes of a row."""
    rows, num_groups = values.shape
    groups = plan.blocks.groups
    values = jnp.pad(values, ((0, 0), (0, plan.blocks.padded_groups - num_groups)))
    values = values.reshape(rows, plan.steps, groups)
    values = jnp.pad(values, ((0, 0), (0, 0), (0, plan.rows - groups)))
    return jnp.broadcast_to(values[..., None], (*values.shape, LANES))


def _gather(plan: Plan, values: Float[Array, "B S R"], num_groups: int) -> Array:
    """(B, G): the reverse of `_spread`, from one lane."""
    flat = values[..., : plan.blocks.groups].reshape(values.shape[0], -1)
    return flat[:, :num_groups]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalize(plan: Plan, x, scale, bias, before, places):
    result = normalize(plan, x, scale, bias, before, places, save_statistics=False)
    return result.y, result.last


def _normalize_forward(plan: Plan, x, scale, bias, before, places):
    result = normalize(plan, x, scale, bias, before, places, save_statistics=True)
    result = name_residuals(result, "timestep_norm")
    return (result.y, result.last), (x, scale, result.statistics, places)


def _normalize_backward(plan: Plan, residuals, cotangents):
    x, scale, statistics, places = residuals
    dy, d_last = cotangents
    # Of `last` only the last lane is handed out.
    d_last = jnp.broadcast_to(d_last[..., -1:], d_last.shape)
    grads = differentiate(plan, x, dy, d_last, scale, statistics, places)
    return grads.x, grads.scale.sum(axis=0), grads.bias.sum(axis=0), grads.before, None


_normalize.defvjp(_normalize_forward, _normalize_backward)
