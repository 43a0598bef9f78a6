"""The products of tokens, states and tables that both of CEMA's TPU kernels are made of.

A channel's states fill a quarter of the 128 lanes (N up to 16), the MXU multiplies all of them. So
the two bfloat16 terms of tables and states stand side by side in the lanes that would hold zeros,
and one pass over the rows does what would take two or three. Float32 products and N above 16 go the
plain way.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.cema.pallas_tpu.layout import (
    HALF,
    LANES,
    Plan,
    multiply,
    split,
    stack,
    table_of_group,
)

# Terms beside each other need four slots of lanes: high and low of states times those of tables.
_SLOTS = 4


def sum_up(
    rows: list[Float[Array, "J T"]], table: Any, group: Array, plan: Plan
) -> Float[Array, "J 128"]:
    """Σ_t table[lane, t] row[t], each channel's row with the lanes of its own orders."""
    terms = table_of_group(table, group)
    if not _fits(plan):
        sums = multiply(stack(rows, plan), terms, (1, 1), plan)
        return _select([(part, i) for i, part in enumerate(_rows_of_channels(sums, plan))], plan)
    high, low = [], []
    for first in (0, 1):
        # Of channels first and first + 2: high terms in their own lanes, low ones in the next.
        channels = (first, first + 2)
        weights = _arrange(
            terms, {(c + step) % _SLOTS: (step, c) for c in channels for step in (0, 1)}, plan
        )
        sums = multiply(stack([rows[c] for c in channels], plan), (weights,), (1, 1), plan)
        for c, part in zip(channels, jnp.split(sums, 2, axis=0), strict=True):
            high.append((part, c))
            low.append((part, (c + 1) % _SLOTS))
    return _select(high, plan) + _rotate(_select(low, plan), -1, plan)


def read_out(
    states: Float[Array, "J 128"], table: Any, group: Array, plan: Plan
) -> list[Float[Array, "J T"]]:
    """Σ_lane states[lane] table[lane, t] over each channel's own lanes."""
    terms = table_of_group(table, group)
    if not _fits(plan):
        rows = split(_one_channel_a_row(states, plan), plan.exact)
        return _rows_of_channels(multiply(rows, terms, (1, 0), plan), plan)
    high, low = (term.astype(jnp.float32) for term in split(states, plan.exact))
    # Slot s after a channel's own holds term s of its states, to meet term s of the table.
    slots = [high, _rotate(low, 1, plan), _rotate(high, 2, plan), _rotate(low, 3, plan)]
    products = []
    for c in range(plan.group):
        row = _select([(slot, (c + s) % _SLOTS) for s, slot in enumerate(slots)], plan)
        weights = _arrange(terms, {(c + s) % _SLOTS: (s // 2, c) for s in range(_SLOTS)}, plan)
        products.append(multiply(stack([row], plan), (weights,), (1, 0), plan))
    return products


def table_gradient(
    states: Float[Array, "J 128"], rows: list[Float[Array, "J T"]], plan: Plan
) -> Float[Array, "128 T"]:
    """Σ_j states[j, lane] row[j, t], for each channel's own lanes and row."""
    if not _fits(plan):
        own = split(_one_channel_a_row(states, plan), plan.exact)
        return multiply(own, stack(rows, plan), (0, 0), plan)
    high, low = (term.T for term in split(states, plan.exact))
    sums = []
    for c, row in enumerate(rows):
        both = jnp.concatenate(
            [_lanes(term, part * plan.group + c, plan) for term in (high, low) for part in (0, 1)]
        )
        product = multiply((both,), stack([row], plan), (1, 0), plan)
        sums.append(product[: 2 * plan.order] + product[2 * plan.order :])
    return jnp.concatenate([s[: plan.order] for s in sums] + [s[plan.order :] for s in sums])


def _fits(plan: Plan) -> bool:
    return not plan.exact and plan.group == _SLOTS


def _lanes(table: Array, number: int, plan: Plan) -> Array:
    return table[number * plan.order : (number + 1) * plan.order]


def _arrange(terms: tuple[Array, ...], slots: dict[int, tuple[int, int]], plan: Plan) -> Array:
    """A weight whose slot s has, for `slots[s]` = (term, channel), that channel's lanes."""
    parts: list[Array] = [terms[0]] * (2 * _SLOTS)
    for slot, (term, channel) in slots.items():
        # What passes the last channel's lanes ends up in the other half, imaginary or real.
        shift = 1 if slot < channel else 0
        for half in (0, 1):
            part = (half + shift) % 2
            parts[part * _SLOTS + slot] = _lanes(terms[term], half * _SLOTS + channel, plan)
    return jnp.concatenate(parts, axis=0)


def _rotate(a: Array, slots: int, plan: Plan) -> Array:
    return jnp.roll(a, slots * plan.order, axis=-1)


def _select(candidates: list[tuple[Array, int]], plan: Plan) -> Array:
    """From every array the lanes of its channel."""
    channel = lax.broadcasted_iota(jnp.int32, (1, LANES), 1) % HALF // plan.order
    merged = candidates[0][0]
    for array, own in candidates[1:]:
        merged = jnp.where(channel == own, array, merged)
    return merged


def _one_channel_a_row(states: Float[Array, "J 128"], plan: Plan) -> Float[Array, "I*J 128"]:
    zero = jnp.zeros_like(states)
    rows = [_select([(zero, -1), (states, i)], plan) for i in range(plan.group)]
    return jnp.concatenate(rows, axis=0)


def _rows_of_channels(rows: Float[Array, "I*J K"], plan: Plan) -> list[Float[Array, "J K"]]:
    return jnp.split(rows, plan.group, axis=0)
