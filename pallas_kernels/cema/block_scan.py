"""The scan over blocks: states entering every block, in logarithmic depth."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Complex

from pallas_kernels.cema.block_sizes import SCAN_FAN_IN


def level_exponents(num_blocks: int, block_size: int) -> tuple[int, ...]:
    """Exponents of q that `entering_states` needs: T, T F, T F², ... for fan-in F."""
    exponents = [block_size]
    while num_blocks > SCAN_FAN_IN:
        num_blocks = -(-num_blocks // SCAN_FAN_IN)
        exponents.append(exponents[-1] * SCAN_FAN_IN)
    return tuple(exponents)


def entering_states(
    increments: Complex[Array, "D B J N"],
    is_whole: Bool[Array, "B J"] | None,
    decay_levels: tuple[Complex[Array, "D N"], ...],
    initial: Complex[Array, "D B N"],
) -> Complex[Array, "D B J N"]:
    """H[0] = initial, H[j+1] = decay H[j] + increments[j], decay counting as 0 where not `is_whole`.

    F blocks merge into one with decay^F, and so on up; every level is one fused pass over its own data, so
    the traffic is that of reading twice and writing once. The decays of the levels come from the
    parameters, not from squaring, which would double the error of the phase at every level.
    """
    count = increments.shape[2]
    if count <= SCAN_FAN_IN:
        return _chain(increments[:, :, None], _group(is_whole), decay_levels[0], initial[:, :, None])[
            :, :, 0
        ]
    missing = -count % SCAN_FAN_IN
    padded = jnp.pad(increments, ((0, 0), (0, 0), (0, missing), (0, 0)))
    rows, order = increments.shape[1], increments.shape[3]
    grouped = padded.reshape(-1, rows, (count + missing) // SCAN_FAN_IN, SCAN_FAN_IN, order)
    whole = None
    if is_whole is not None:
        whole = jnp.pad(is_whole, ((0, 0), (0, missing))).reshape(grouped.shape[1:4])
    sums = _merge(grouped, whole, decay_levels[0])
    whole_groups = None if whole is None else whole.all(axis=-1)
    entering = entering_states(sums, whole_groups, decay_levels[1:], initial)
    states = _chain(grouped, whole, decay_levels[0], entering)
    return states.reshape(padded.shape)[:, :, :count]


def _group(is_whole: Array | None) -> Array | None:
    return None if is_whole is None else is_whole[:, None]


def _advance(state: Array, increment: Array, whole: Array | None, decay: Array) -> Array:
    carried = decay[:, None, None] * state
    if whole is not None:
        carried = jnp.where(whole[None, ..., None], carried, 0)
    return carried + increment


def _merge(grouped: Array, whole: Array | None, decay: Array) -> Array:
    total = grouped[..., 0, :]
    for i in range(1, grouped.shape[3]):
        total = _advance(total, grouped[..., i, :], None if whole is None else whole[..., i], decay)
    return total


def _chain(grouped: Array, whole: Array | None, decay: Array, entering: Array) -> Array:
    states = [entering]
    for i in range(grouped.shape[3] - 1):
        mask = None if whole is None else whole[..., i]
        states.append(_advance(states[-1], grouped[..., i, :], mask, decay))
    return jnp.stack(states, axis=3)
