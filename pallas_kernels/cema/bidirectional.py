"""Bidirectional CEMA: one average runs forward, another one backward, by the causal operation.

The backward half is the forward half of reversed documents, one token late:

    1. the input of the backward half is x shifted by one token within its document;
    2. documents are reversed in place, so that both halves have the same segment ids;
    3. one call of `cema` averages [x, reversed] as 2D channels;
    4. the second half is reversed back and added to the first.

Sequence shards are reversed as rows by one exchange; then the halves have different segment ids
and take one call each.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.cema.api import cema
from pallas_kernels.cema.types import CemaParams
from pallas_kernels.common.dispatch import Implementation

# Above every segment id: reversed rows are numbered from it down, so that their ids increase.
_ABOVE_IDS = 1 << 30


def bidirectional_cema(
    x: Float[Array, "B L D"],
    params: CemaParams,
    *,
    segment_ids: Int32[Array, "B L"] | None = None,
    implementation: Implementation | None = None,
    block_size: int | None = None,
    sequence_axis: str | None = None,
) -> Float[Array, "B L D"]:
    """y[t] = Σ_{s≤t} kf[t-s]·x[s] + Σ_{s>t} kb[s-t-1]·x[s] + omega·x[t].

    k[j] = Re(Σ_n gamma_n/√N · p_n·q_n^j) as in `cema`; kf is that of channels 0..D-1 of the
    parameters, kb that of D..2D-1. A token counts once, in the forward direction (Ma et al. 2024,
    appendix C, as in the authors' encoders). Sums are over the token's document.

    Args:
      x: bfloat16, float32 or float64.
      params: float32, or float64 to compute in float64; alpha and delta (2D, N), theta (2D,),
        gamma (2D, N, 2), omega (D,).
      segment_ids: the document of every token, contiguous; 0 is padding, whose y is 0. None: one
        document without padding.
      implementation: see `cema`.
      block_size: see `cema`.
      sequence_axis: see `cema`.

    Returns:
      y in x's dtype.

    Raises:
      ValueError: the parameters are not those of two directions, or `cema` refuses the operands.
    """
    D = x.shape[-1]
    if params.omega.shape != (D,) or params.alpha.shape[:1] != (2 * D,):
        raise ValueError(
            f"x has {D} channels, alpha shape {params.alpha.shape} and omega "
            f"{params.omega.shape}; two directions need alpha ({2 * D}, N) and omega ({D},)"
        )
    none = jnp.zeros_like(params.omega)
    if sequence_axis is not None:
        forward = CemaParams(*(v[:D] for v in params[:4]), omega=params.omega)  # type: ignore[arg-type]
        backward = CemaParams(*(v[D:] for v in params[:4]), omega=none)  # type: ignore[arg-type]
        following = _shift_left(x, segment_ids, sequence_axis)

        def average(x: Array, params: CemaParams, ids: Array | None) -> Array:
            return cema(
                x,
                params,
                segment_ids=ids,
                implementation=implementation,
                block_size=block_size,
                sequence_axis=sequence_axis,
            ).y

        ids = segment_ids
        if ids is not None:
            ids = _reverse_rows(jnp.where(ids == 0, 0, _ABOVE_IDS - ids), sequence_axis)
        reversed_rows = average(_reverse_rows(following, sequence_axis), backward, ids)
        return average(x, forward, segment_ids) + _reverse_rows(reversed_rows, sequence_axis)
    following = _shift_left(x, segment_ids, None)
    if segment_ids is None:
        reverse = _flip
    else:
        source = _reversed_columns(segment_ids)

        def reverse(x: Array) -> Array:
            return _permute(x, source)

    both = cema(
        jnp.concatenate([x, reverse(following)], axis=-1),
        params._replace(omega=jnp.concatenate([params.omega, none])),
        segment_ids=segment_ids,
        implementation=implementation,
        block_size=block_size,
    ).y
    return both[..., :D] + reverse(both[..., D:])


def _flip(x: Array) -> Array:
    return jnp.flip(x, axis=1)


def _shift_left(x: Array, segment_ids: Array | None, axis: str | None) -> Array:
    """The next token of every token's document, 0 after its last one."""

    def following(x: Array) -> Array:
        first = x[:, :1]
        if axis is None:
            next_first = jnp.zeros_like(first)
        else:
            pairs = [(i + 1, i) for i in range(jax.lax.axis_size(axis) - 1)]
            next_first = jax.lax.ppermute(first, axis, pairs)
        return jnp.concatenate([x[:, 1:], next_first], axis=1)

    if segment_ids is None:
        return following(x)
    is_same: Bool[Array, "B L"] = following(segment_ids) == segment_ids
    return jnp.where(is_same[..., None], following(x), 0)


def _reverse_rows(x: Array, axis: str) -> Array:
    """Whole rows in reverse order: every shard is flipped and goes to the mirrored device."""
    last = jax.lax.axis_size(axis) - 1
    return jax.lax.ppermute(_flip(x), axis, [(i, last - i) for i in range(last + 1)])


def _reversed_columns(segment_ids: Int32[Array, "B L"]) -> Int32[Array, "B L"]:
    """The column with which every column changes places if documents are reversed in place."""
    columns = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    is_border = segment_ids[:, 1:] != segment_ids[:, :-1]
    is_first = jnp.pad(is_border, ((0, 0), (1, 0)), constant_values=True)
    is_last = jnp.pad(is_border, ((0, 0), (0, 1)), constant_values=True)
    first = jax.lax.cummax(jnp.where(is_first, columns, 0), axis=1)
    last = jax.lax.cummin(jnp.where(is_last, columns, segment_ids.shape[1]), axis=1, reverse=True)
    return first + last - columns


@jax.custom_vjp
def _permute(x: Float[Array, "B L D"], source: Int32[Array, "B L"]) -> Float[Array, "B L D"]:
    """x[source] of every row; `source` is its own inverse.

    The gradient of an index is a sum by atomic updates. That of this permutation is the permutation
    itself.
    """
    return jax.vmap(lambda row, columns: row.at[columns].get(mode="promise_in_bounds"))(x, source)


_permute.defvjp(
    lambda x, source: (_permute(x, source), source),
    lambda source, dy: (_permute(dy, source), None),
)
