"""CEMA by its definition, one token at a time: slow, float64-capable, autodiff for gradients."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, Int32

from pallas_kernels.cema.types import CemaOutput, CemaParams


def cema_reference(
    x: Float[Array, "B L D"],
    params: CemaParams,
    initial_state: Complex[Array, "B D N"] | None,
    segment_ids: Int32[Array, "B L"] | None,
    *,
    block_size: int | None = None,
) -> CemaOutput:
    """The definition in `api.cema`, as a scan over tokens.

    Raises:
      ValueError: a block size; the recurrence has none.
    """
    if block_size is not None:
        raise ValueError("implementation 'reference' has no blocks; leave block_size out")
    order = params.alpha.shape[-1]
    p = jax.nn.sigmoid(params.alpha)
    modulus = 1 - p * jax.nn.sigmoid(params.delta)
    base_angle = jax.nn.sigmoid(params.theta)[:, None] * (2 * math.pi / order)
    angle = jnp.arange(1, order + 1, dtype=modulus.dtype) * base_angle
    q = jax.lax.complex(modulus * jnp.cos(angle), modulus * jnp.sin(angle))
    gamma = jax.lax.complex(params.gamma[..., 0], params.gamma[..., 1]) / math.sqrt(order)
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], *q.shape), q.dtype)
    if segment_ids is None:
        segment_ids = jnp.ones(x.shape[:2], jnp.int32)

    def step(carry: tuple[Array, Array], token: tuple[Array, Array]):
        h, last_segment = carry
        x_t, segment = token
        is_token = segment != 0
        starts = is_token & (segment != last_segment) & (last_segment != 0)
        x_t = jnp.where(is_token[:, None], x_t, 0)
        new_h = q * jnp.where(starts[:, None, None], 0, h) + p * x_t[..., None]
        y_t = jnp.sum((gamma * new_h).real, axis=-1) + params.omega * x_t
        h = jnp.where(is_token[:, None, None], new_h, h)
        y_t = jnp.where(is_token[:, None], y_t, 0)
        return (h, jnp.where(is_token, segment, last_segment)), y_t

    tokens = (jnp.swapaxes(x, 0, 1).astype(modulus.dtype), segment_ids.T)
    (h, _), y = jax.lax.scan(step, (initial_state, jnp.zeros_like(segment_ids[:, 0])), tokens)
    return CemaOutput(jnp.swapaxes(y, 0, 1).astype(x.dtype), h)
