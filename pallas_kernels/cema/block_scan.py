"""The scan over blocks: the state before every block, in few steps, forward or backward in time.

Complex numbers are packed as [real parts | imaginary parts], the layout of the matrix products.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Complex, Float

from pallas_kernels.cema.block_sizes import SCAN_FAN_IN
from pallas_kernels.cema.coefficients import pack, unpack


def level_exponents(num_blocks: int, block_size: int) -> tuple[int, ...]:
    """Exponents of q whose powers `scan_blocks` needs: T, T F, T F², ... for fan-in F."""
    exponents = [block_size]
    while num_blocks > SCAN_FAN_IN:
        num_blocks = -(-num_blocks // SCAN_FAN_IN)
        exponents.append(exponents[-1] * SCAN_FAN_IN)
    return tuple(exponents)


def scan_blocks(
    increments: Float[Array, "D B J 2N"],
    passes_state_through: Bool[Array, "B J"] | None,
    decays: tuple[Float[Array, "D 2N"], ...],
    initial: Float[Array, "D B 2N"] | None,
) -> Float[Array, "D B J 2N"]:
    """The state before every block: H[0] = initial, H[j+1] = decay·H[j] + increments[j].

    The decay is 0 where not `passes_state_through`. If `initial` is None the scan runs backward in
    time from 0: H[J-1] = 0, H[j-1] = conj(decay)·H[j] + increments[j].

    A hierarchical scan: F blocks merge into one with decay^F, level upon level. Each level takes F
    steps, reads its data twice and writes it once. The decays of the levels come from the
    parameters, because squaring would double the error of the phase at every level.

    Args:
      increments: the state that each block adds.
      passes_state_through: blocks that the state before them passes through; None: all of them.
      decays: decay^(F^i), one for each entry of `level_exponents`.
      initial: the state before the first block, or None.
    """
    count, width = increments.shape[2:]
    fan_in = min(count, SCAN_FAN_IN)
    missing = -count % fan_in
    padded = jnp.pad(increments, ((0, 0), (0, 0), (0, missing), (0, 0)))
    grouped = padded.reshape(*increments.shape[:2], -1, fan_in, width)
    passes = None
    if passes_state_through is not None:
        passes = jnp.pad(passes_state_through, ((0, 0), (0, missing)))
        passes = passes.reshape(grouped.shape[1:4])
    backward = initial is None
    decay = unpack(decays[0][:, None, None])
    decay = jnp.conj(decay) if backward else decay
    if count <= fan_in:
        start = jnp.zeros_like(grouped[:, :, :, 0]) if initial is None else initial[:, :, None]
    else:
        merged = _merge(grouped, passes, decay, backward)
        group_passes = None if passes is None else passes.all(axis=-1)
        start = scan_blocks(merged, group_passes, decays[1:], initial)
    states = _states_within_groups(grouped, passes, decay, start, backward)
    return states.reshape(padded.shape)[:, :, :count]


def _merge(
    grouped: Float[Array, "D B K F 2N"],
    passes: Bool[Array, "B K F"] | None,
    decay: Complex[Array, "D 1 1 N"],
    backward: bool,
) -> Float[Array, "D B K 2N"]:
    """The state that each group of F successive blocks adds."""
    order = list(range(grouped.shape[3]))[:: -1 if backward else 1]
    total = unpack(grouped[..., order[0], :])
    for i in order[1:]:
        block_passes = None if passes is None else passes[..., i]
        total = _advance(total, decay, block_passes, unpack(grouped[..., i, :]))
    return pack(total)


def _states_within_groups(
    grouped: Float[Array, "D B K F 2N"],
    passes: Bool[Array, "B K F"] | None,
    decay: Complex[Array, "D 1 1 N"],
    start: Float[Array, "D B K 2N"],
    backward: bool,
) -> Float[Array, "D B K F 2N"]:
    last = grouped.shape[3] - 1

    def step(k: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        states, state = carry
        i = last - k if backward else k
        increment = unpack(lax.dynamic_index_in_dim(states, i, axis=3, keepdims=False))
        block_passes = None
        if passes is not None:
            block_passes = lax.dynamic_index_in_dim(passes, i, axis=2, keepdims=False)
        # In place: the state overwrites its increment, so that no second array of this size exists.
        states = lax.dynamic_update_index_in_dim(states, pack(state), i, axis=3)
        return states, _advance(state, decay, block_passes, increment)

    return lax.fori_loop(0, last + 1, step, (grouped, unpack(start)))[0]


def _advance(state: Array, decay: Array, passes: Array | None, increment: Array) -> Array:
    carried = decay * state
    if passes is not None:
        carried = jnp.where(passes[None, ..., None], carried, 0)
    return carried + increment
