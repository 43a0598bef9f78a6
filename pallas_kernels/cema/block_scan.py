"""The scan over blocks: states between blocks, in few steps, forward or backward in time.

Complex numbers arrive packed as [real parts | imaginary parts], as matrix products want them.
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
    is_whole: Bool[Array, "B J"] | None,
    decays: tuple[Float[Array, "D 2N"], ...],
    initial: Float[Array, "D B 2N"] | None,
) -> Float[Array, "D B J 2N"]:
    """States entering every block: H[0] = initial, H[j+1] = decay·H[j] + increments[j].

    Where not `is_whole`, decay counts as 0. With `initial` None the scan runs back in time from 0:
    H[J-1] = 0, H[j-1] = conj(decay)·H[j] + increments[j].

    F blocks merge into one with decay^F, and so on up: F steps a level instead of J in all, and the
    data is read twice and written once. The decays of the levels come from the parameters, not from
    squaring, which would double the error of the phase every time.

    Args:
      increments: what each block adds.
      is_whole: blocks that hand on the state before them; None if all do.
      decays: decay^(F^i), one for each entry of `level_exponents`.
      initial: the state before the first block, or None.
    """
    count, width = increments.shape[2:]
    fan_in = min(count, SCAN_FAN_IN)
    missing = -count % fan_in
    padded = jnp.pad(increments, ((0, 0), (0, 0), (0, missing), (0, 0)))
    grouped = padded.reshape(*increments.shape[:2], -1, fan_in, width)
    whole = None
    if is_whole is not None:
        whole = jnp.pad(is_whole, ((0, 0), (0, missing))).reshape(grouped.shape[1:4])
    backward = initial is None
    decay = unpack(decays[0][:, None, None])
    decay = jnp.conj(decay) if backward else decay
    if count <= fan_in:
        start = jnp.zeros_like(grouped[:, :, :, 0]) if initial is None else initial[:, :, None]
    else:
        merged = _merge(grouped, whole, decay, backward)
        whole_groups = None if whole is None else whole.all(axis=-1)
        start = scan_blocks(merged, whole_groups, decays[1:], initial)
    states = _states_within_groups(grouped, whole, decay, start, backward)
    return states.reshape(padded.shape)[:, :, :count]


def _merge(
    grouped: Float[Array, "D B K F 2N"],
    whole: Bool[Array, "B K F"] | None,
    decay: Complex[Array, "D 1 1 N"],
    backward: bool,
) -> Float[Array, "D B K 2N"]:
    """What each group of F successive blocks adds as a whole."""
    order = list(range(grouped.shape[3]))[:: -1 if backward else 1]
    total = unpack(grouped[..., order[0], :])
    for i in order[1:]:
        keeps = None if whole is None else whole[..., i]
        total = _advance(total, decay, keeps, unpack(grouped[..., i, :]))
    return pack(total)


def _states_within_groups(
    grouped: Float[Array, "D B K F 2N"],
    whole: Bool[Array, "B K F"] | None,
    decay: Complex[Array, "D 1 1 N"],
    start: Float[Array, "D B K 2N"],
    backward: bool,
) -> Float[Array, "D B K F 2N"]:
    last = grouped.shape[3] - 1

    def step(k: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        states, state = carry
        i = last - k if backward else k
        increment = unpack(lax.dynamic_index_in_dim(states, i, axis=3, keepdims=False))
        keeps = None
        if whole is not None:
            keeps = lax.dynamic_index_in_dim(whole, i, axis=2, keepdims=False)
        # A state takes the place of its increment: no second array of this size exists.
        states = lax.dynamic_update_index_in_dim(states, pack(state), i, axis=3)
        return states, _advance(state, decay, keeps, increment)

    return lax.fori_loop(0, last + 1, step, (grouped, unpack(start)))[0]


def _advance(state: Array, decay: Array, keeps: Array | None, increment: Array) -> Array:
    carried = decay * state
    if keeps is not None:
        carried = jnp.where(keeps[None, ..., None], carried, 0)
    return carried + increment
