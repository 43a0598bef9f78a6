"""Coefficients of a step from CEMA's parameters, and the state's layout with channels last."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float

from pallas_kernels.cema.coefficients import input_weight, output_weight, powers
from pallas_kernels.cema.types import CemaParams
from pallas_kernels.state_step.types import CemaStepTables


def cema_step_tables(params: CemaParams) -> CemaStepTables:
    """The coefficients of one step, to be computed once for all tokens.

    p = sigmoid(alpha);  q = (1 - sigmoid(alpha) sigmoid(delta)) exp(i n sigmoid(theta) 2π/N), as in
    `pallas_kernels.cema`.

    Args:
      params: CEMA's parameters, float32 or float64.

    Returns:
      Tables of the parameters' dtype.
    """
    q = powers(params, jnp.ones((1,), jnp.int32))[..., 0].T
    gamma = output_weight(params).T
    return CemaStepTables(
        q.real, q.imag, input_weight(params).T, gamma.real, gamma.imag, params.omega
    )


def pack_state(state: Complex[Array, "B D N"]) -> Float[Array, "B 2N D"]:
    """CEMA's complex state as real parts, then imaginary parts, with channels last."""
    state = jnp.swapaxes(state, 1, 2)
    return jnp.concatenate([state.real, state.imag], axis=1)


def unpack_state(packed: Float[Array, "B 2N D"]) -> Complex[Array, "B D N"]:
    """The inverse of `pack_state`."""
    order = packed.shape[1] // 2
    return jnp.swapaxes(jax.lax.complex(packed[:, :order], packed[:, order:]), 1, 2)
