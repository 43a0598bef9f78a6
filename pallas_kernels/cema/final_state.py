"""The state after a row without the row's outputs: what a part of a sequence hands on.

    h = Σ_t q^(T-1-t) p x[t] + q^T h₀

by groups of tokens, groups of groups and so on: the exponents in every group are the same, so that
the tables stay small. Plain JAX; its gradients are autodiff's.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, Int32

from pallas_kernels.cema.coefficients import input_weight, pack, powers, unpack
from pallas_kernels.cema.segments import rotate_rows
from pallas_kernels.cema.types import CemaParams
from pallas_kernels.common import context_parallel

_GROUP = 64
_PRECISION = jax.lax.Precision.HIGHEST


def last_state(
    x: Float[Array, "B L D"],
    params: CemaParams,
    state: Complex[Array, "B D N"] | None = None,
    segment_ids: Int32[Array, "B L"] | None = None,
) -> Complex[Array, "B D N"]:
    """The state after each row's last token that is not padding; arguments as in `api.cema`."""
    rows, length, _ = x.shape
    part = context_parallel.local_documents(segment_ids, rows, length)
    x = x.astype(params.alpha.dtype)
    if segment_ids is not None:
        is_last = (segment_ids == part.last[:, None]) & (segment_ids != 0)
        end = jnp.where(is_last, jnp.arange(length, dtype=jnp.int32), -1).max(axis=1)
        x = rotate_rows(jnp.where(is_last[..., None], x, 0), end + 1)
    h = _sum_groups(_sum_tokens(x, params), params, min(_GROUP, length))[:, 0] * input_weight(
        params
    )
    if state is None:
        return h
    goes_on = (part.first == part.last)[:, None, None]
    carried = jnp.moveaxis(powers(params, part.num_tokens), -1, 0) * state
    # A row of padding alone has no tokens: its state stays.
    return h + jnp.where(goes_on, carried, 0)


def _sum_tokens(x: Float[Array, "B L D"], params: CemaParams) -> Complex[Array, "B K D N"]:
    """Σ q^(last of the group - t) x[t] of every group."""
    groups = _grouped(x)
    table = _group_powers(params, 1, groups.shape[2])
    table = pack(jnp.swapaxes(table, 1, 2))
    return unpack(jnp.einsum("bktd,dtm->bkdm", groups, table, precision=_PRECISION))


def _sum_groups(
    sums: Complex[Array, "B K D N"], params: CemaParams, tokens: int
) -> Complex[Array, "B 1 D N"]:
    """The sum over a row from those of its groups of so many tokens."""
    while sums.shape[1] > 1:
        groups = _grouped(sums)
        table = jnp.moveaxis(_group_powers(params, tokens, groups.shape[2]), -1, 0)
        sums, tokens = (groups * table).sum(axis=2), tokens * groups.shape[2]
    return sums


def _grouped(a: Array) -> Array:
    """(B, K, ...) in groups (B, K / F, F, ...), zeros before a row's start."""
    size = min(_GROUP, a.shape[1])
    missing = -a.shape[1] % size
    a = jnp.pad(a, ((0, 0), (missing, 0)) + ((0, 0),) * (a.ndim - 2))
    return a.reshape(a.shape[0], -1, size, *a.shape[2:])


def _group_powers(params: CemaParams, tokens: int, size: int) -> Complex[Array, "D N F"]:
    """q^(tokens (F-1)), ..., q^tokens, 1."""
    return powers(params, tokens * jnp.arange(size - 1, -1, -1, dtype=jnp.int32))
