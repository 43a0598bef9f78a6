"""The final state of a row without its outputs: the summary of a sequence shard.

    h = Σ_t q^(T-1-t) p x[t] + q^T h₀

A hierarchical sum: over groups of tokens, groups of groups and so on. All groups of one level share
their exponents, so the tables stay small. Plain JAX, differentiable by autodiff.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, Int32

from pallas_kernels.cema.coefficients import input_weight, pack, powers, unpack
from pallas_kernels.cema.segments import rotate_rows
from pallas_kernels.cema.types import CemaParams
from pallas_kernels.common.context_parallel import local_documents

_GROUP_SIZE = 64
_PRECISION = jax.lax.Precision.HIGHEST


def final_state(
    x: Float[Array, "B L D"],
    params: CemaParams,
    initial_state: Complex[Array, "B D N"] | None = None,
    segment_ids: Int32[Array, "B L"] | None = None,
) -> Complex[Array, "B D N"]:
    """The state after each row's last token that is not padding; arguments as in `api.cema`."""
    rows, length, _ = x.shape
    documents = local_documents(segment_ids, rows, length)
    x = x.astype(params.alpha.dtype)
    if segment_ids is not None:
        # The last document, right-aligned, with zeros before it.
        is_last = (segment_ids == documents.last[:, None]) & (segment_ids != 0)
        end = jnp.where(is_last, jnp.arange(length, dtype=jnp.int32), -1).max(axis=1)
        x = rotate_rows(jnp.where(is_last[..., None], x, 0), end + 1)
    sums = _sum_groups(_sum_tokens(x, params), params, min(_GROUP_SIZE, length))
    h = sums[:, 0] * input_weight(params)
    if initial_state is None:
        return h
    continues = (documents.first == documents.last)[:, None, None]
    decayed = jnp.moveaxis(powers(params, documents.num_tokens), -1, 0) * initial_state
    # A row of padding has num_tokens = 0: its state stays.
    return h + jnp.where(continues, decayed, 0)


def _sum_tokens(x: Float[Array, "B L D"], params: CemaParams) -> Complex[Array, "B K D N"]:
    """Σ_t q^(F-1-t) x[t] of every group of F tokens."""
    groups = _to_groups(x)
    table = _group_powers(params, 1, groups.shape[2])
    table = pack(jnp.swapaxes(table, 1, 2))
    return unpack(jnp.einsum("bktd,dtm->bkdm", groups, table, precision=_PRECISION))


def _sum_groups(
    sums: Complex[Array, "B K D N"], params: CemaParams, tokens: int
) -> Complex[Array, "B 1 D N"]:
    """The sum over a row from the sums of its groups, each of `tokens` tokens."""
    while sums.shape[1] > 1:
        groups = _to_groups(sums)
        table = jnp.moveaxis(_group_powers(params, tokens, groups.shape[2]), -1, 0)
        sums, tokens = (groups * table).sum(axis=2), tokens * groups.shape[2]
    return sums


def _to_groups(a: Array) -> Array:
    """(B, K, ...) to (B, K / F, F, ...), left-padded with zeros."""
    size = min(_GROUP_SIZE, a.shape[1])
    missing = -a.shape[1] % size
    a = jnp.pad(a, ((0, 0), (missing, 0)) + ((0, 0),) * (a.ndim - 2))
    return a.reshape(a.shape[0], -1, size, *a.shape[2:])


def _group_powers(params: CemaParams, tokens: int, size: int) -> Complex[Array, "D N F"]:
    """q^(tokens (F-1)), ..., q^tokens, 1."""
    return powers(params, tokens * jnp.arange(size - 1, -1, -1, dtype=jnp.int32))
