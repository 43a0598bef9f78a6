"""CEMA under context parallelism: the state before each sequence shard.

Inside `jax.shard_map` every device holds one sequence shard. Forward:

    1. summarize the own shard: its final state if its documents started from zero;
    2. `incoming_state`: all-gather the summaries, fold those of the shards before;
    3. run the own shard from that state.

Backward the same happens in reverse order with the adjoint state, by `incoming_state_vjp`.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, Int32

from pallas_kernels.cema.coefficients import pack, powers, unpack
from pallas_kernels.cema.final_state import final_state
from pallas_kernels.cema.types import CemaOutput, CemaParams
from pallas_kernels.common.context_parallel import (
    LocalDocuments,
    all_gather_summaries,
    exclusive_fold,
    exclusive_fold_vjp,
    local_documents,
)


class RunCema(Protocol):
    """CEMA of whole rows, or of a sequence shard from the state before it."""

    def __call__(
        self,
        x: Float[Array, "B L D"],
        params: CemaParams,
        initial_state: Complex[Array, "B D N"] | None,
        segment_ids: Int32[Array, "B L"] | None,
        *,
        block_size: int | None,
    ) -> CemaOutput: ...


class CemaImplementation(Protocol):
    """An entry of `api.IMPLEMENTATIONS`: arguments as in `api.cema`, checked."""

    def __call__(
        self,
        x: Float[Array, "B L D"],
        params: CemaParams,
        initial_state: Complex[Array, "B D N"] | None,
        segment_ids: Int32[Array, "B L"] | None,
        *,
        block_size: int | None,
        sequence_axis: str | None,
    ) -> CemaOutput: ...


class ShardDecays(NamedTuple):
    """How much of a state each sequence shard leaves.

    Attributes:
      documents: documents of all shards, leading axis S.
      decays: q^tokens for the tokens of each shard's last document, packed.
    """

    documents: LocalDocuments
    decays: Float[Array, "S B D 2N"]


def with_context_parallelism(
    run: RunCema, summarize: Callable[..., Complex[Array, "B D N"]] | None = None
) -> CemaImplementation:
    """An implementation that also runs on sequence shards.

    Args:
      run: CEMA of one shard from the state before it.
      summarize: `(x, params, segment_ids, block_size=...)` to the final state of one shard from
        zero; `final_state` if None.
    """

    def implementation(x, params, initial_state, segment_ids, *, block_size, sequence_axis):
        if sequence_axis is not None:
            documents = local_documents(segment_ids, *x.shape[:2])
            if summarize is None:
                summary = final_state(x, params, None, segment_ids)
            else:
                summary = summarize(x, params, segment_ids, block_size=block_size)
            initial_state, _ = incoming_state(summary, documents, params, sequence_axis)
        return run(x, params, initial_state, segment_ids, block_size=block_size)

    return implementation


def incoming_state(
    summary: Complex[Array, "B D N"],
    documents: LocalDocuments,
    params: CemaParams,
    axis: str,
) -> tuple[Complex[Array, "B D N"], ShardDecays]:
    """The state before this device's sequence shard, and what its transpose needs.

    Args:
      summary: the final state of this shard if its last document started from zero here.
      documents: of this shard.
      params: CEMA's parameters.
      axis: mesh axis of the sequence shards.
    """
    all_documents, summaries = all_gather_summaries(documents, pack(summary), axis)
    tokens = all_documents.num_tokens
    decays = pack(jnp.moveaxis(powers(params, tokens.reshape(-1)), -1, 0))
    shards = ShardDecays(all_documents, decays.reshape(*tokens.shape, *decays.shape[1:]))
    return _fold(summaries, shards, axis), shards


def incoming_state_vjp(
    adjoint: Complex[Array, "B D N"], shards: ShardDecays, axis: str
) -> Complex[Array, "B D N"]:
    """The transpose of `incoming_state`: one reduce-scatter, the mirror of the all-gather.

    Args:
      adjoint: the adjoint state e at this shard's first token, from this shard's dy.
      shards: from `incoming_state`.
      axis: mesh axis of the sequence shards.

    Returns:
      The adjoint state e at the token after this shard.
    """
    zeros = jnp.zeros_like(shards.decays)
    own = exclusive_fold_vjp(lambda summaries: _fold(summaries, shards, axis), zeros, adjoint, axis)
    # JAX's cotangent of z.imag is -i times that of the real number.
    return jnp.conj(unpack(own))


def _fold(
    summaries: Float[Array, "S B D 2N"], shards: ShardDecays, axis: str
) -> Complex[Array, "B D N"]:
    def combine(before: Array, summary: Array, index: int) -> Array:
        return unpack(shards.decays[index]) * before + unpack(summary)

    empty_state = jnp.zeros_like(unpack(summaries[0]))
    return exclusive_fold(shards.documents, summaries, empty_state, combine, axis)
