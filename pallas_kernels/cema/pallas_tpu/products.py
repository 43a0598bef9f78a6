"""The products of tokens, states and tables in CEMA's TPU kernels, forward and backward.

The states of one channel fill a quarter of the 128 lanes (N up to 16), but the MXU multiplies all
lanes. The two bfloat16 terms of tables and states therefore share the lanes: one pass over the rows
replaces two or three. float32 products and N above 16 take one pass per term.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.cema.pallas_tpu.layout import (
    HALF,
    LANES,
    CemaTpuPlan,
    multiply,
    split_terms,
    stack,
    table_of_group,
)

# Slots of lanes for shared products: high and low terms of states, times those of tables.
_SLOTS = 4


def project_to_state(
    rows: list[Float[Array, "J T"]], table: Any, group: Array, plan: CemaTpuPlan
) -> Float[Array, "J 128"]:
    """Σ_t table[lane, t] row[t]: each channel's row with the lanes of its own orders."""
    terms = table_of_group(table, group)
    if not _shares_lanes(plan):
        sums = multiply(stack(rows, plan), terms, (1, 1), plan)
        return _select([(part, i) for i, part in enumerate(_split_channels(sums, plan))], plan)
    high, low = [], []
    for first in (0, 1):
        # Channels first and first + 2: high terms in their own slots, low terms in the next ones.
        channels = (first, first + 2)
        weights = _fill_slots(
            terms, {(c + step) % _SLOTS: (step, c) for c in channels for step in (0, 1)}, plan
        )
        sums = multiply(stack([rows[c] for c in channels], plan), (weights,), (1, 1), plan)
        for c, part in zip(channels, jnp.split(sums, 2, axis=0), strict=True):
            high.append((part, c))
            low.append((part, (c + 1) % _SLOTS))
    return _select(high, plan) + _rotate(_select(low, plan), -1, plan)


def project_to_output(
    states: Float[Array, "J 128"], table: Any, group: Array, plan: CemaTpuPlan
) -> list[Float[Array, "J T"]]:
    """Σ_lane states[lane] table[lane, t] over the lanes of each channel's own orders."""
    terms = table_of_group(table, group)
    if not _shares_lanes(plan):
        rows = split_terms(_one_channel_per_row(states, plan), plan.exact)
        return _split_channels(multiply(rows, terms, (1, 0), plan), plan)
    high, low = (term.astype(jnp.float32) for term in split_terms(states, plan.exact))
    # s slots after a channel's own is term s of its states, for term s of the table.
    slots = [high, _rotate(low, 1, plan), _rotate(high, 2, plan), _rotate(low, 3, plan)]
    products = []
    for c in range(plan.group_size):
        row = _select([(slot, (c + s) % _SLOTS) for s, slot in enumerate(slots)], plan)
        weights = _fill_slots(terms, {(c + s) % _SLOTS: (s // 2, c) for s in range(_SLOTS)}, plan)
        products.append(multiply(stack([row], plan), (weights,), (1, 0), plan))
    return products


def table_gradient(
    states: Float[Array, "J 128"], rows: list[Float[Array, "J T"]], plan: CemaTpuPlan
) -> Float[Array, "128 T"]:
    """Σ_j states[j, lane] row[j, t] for each channel's own lanes and row."""
    if not _shares_lanes(plan):
        own = split_terms(_one_channel_per_row(states, plan), plan.exact)
        return multiply(own, stack(rows, plan), (0, 0), plan)
    high, low = (term.T for term in split_terms(states, plan.exact))
    sums = []
    for c, row in enumerate(rows):
        both_terms = jnp.concatenate(
            [
                _lanes(term, part * plan.group_size + c, plan)
                for term in (high, low)
                for part in (0, 1)
            ]
        )
        product = multiply((both_terms,), stack([row], plan), (1, 0), plan)
        sums.append(product[: 2 * plan.order] + product[2 * plan.order :])
    return jnp.concatenate([s[: plan.order] for s in sums] + [s[plan.order :] for s in sums])


def _shares_lanes(plan: CemaTpuPlan) -> bool:
    return not plan.exact and plan.group_size == _SLOTS


def _lanes(table: Array, number: int, plan: CemaTpuPlan) -> Array:
    return table[number * plan.order : (number + 1) * plan.order]


def _fill_slots(
    terms: tuple[Array, ...], slots: dict[int, tuple[int, int]], plan: CemaTpuPlan
) -> Array:
    """A table whose slot s has the lanes of `slots[s]` = (term, channel)."""
    parts: list[Array] = [terms[0]] * (2 * _SLOTS)
    for slot, (term, channel) in slots.items():
        # Rotation past the last channel moves lanes to the other half, imaginary or real.
        shift = 1 if slot < channel else 0
        for half in (0, 1):
            part = (half + shift) % 2
            parts[part * _SLOTS + slot] = _lanes(terms[term], half * _SLOTS + channel, plan)
    return jnp.concatenate(parts, axis=0)


def _rotate(a: Array, slots: int, plan: CemaTpuPlan) -> Array:
    return jnp.roll(a, slots * plan.order, axis=-1)


def _select(candidates: list[tuple[Array, int]], plan: CemaTpuPlan) -> Array:
    """Merges arrays, each in the lanes of its channel."""
    channel = lax.broadcasted_iota(jnp.int32, (1, LANES), 1) % HALF // plan.order
    merged = candidates[0][0]
    for array, own in candidates[1:]:
        merged = jnp.where(channel == own, array, merged)
    return merged


def _one_channel_per_row(
    states: Float[Array, "J 128"], plan: CemaTpuPlan
) -> Float[Array, "I*J 128"]:
    zero = jnp.zeros_like(states)
    rows = [_select([(zero, -1), (states, i)], plan) for i in range(plan.group_size)]
    return jnp.concatenate(rows, axis=0)


def _split_channels(rows: Float[Array, "I*J K"], plan: CemaTpuPlan) -> list[Float[Array, "J K"]]:
    return jnp.split(rows, plan.group_size, axis=0)
