"""A grid step of CEMA's TPU kernels, forward or backward: 128 channels of one tile of a row.

A tile without document boundaries runs without masks. In the others, masks select the first and the
last segment piece of every block, and the products over lags repeat for every further piece.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

from pallas_kernels.cema.pallas_tpu import layout
from pallas_kernels.cema.pallas_tpu.layout import CemaTpuPlan


class DocumentRefs(NamedTuple):
    """References of `CemaTpuDocuments`; fields are None when unused."""

    cuts: Any = None
    most_cuts: Any = None
    piece: Any = None
    piece_from_end: Any = None


class CemaTpuTile(NamedTuple):
    """A grid step as the stages of a kernel see it.

    Attributes:
      refs: the kernel's references; `documents` and `tables` are common to both kernels.
      plan: what the kernel is specialised for.
      row: index of the row.
      index: index of the tile in the row.
      most_cuts: the most boundaries in a block of the tile; None where there are none.
    """

    refs: Any
    plan: CemaTpuPlan
    row: Array
    index: Array
    most_cuts: Array | None

    def passes_state_through(self, block: Array) -> Array | None:
        """Whether the state before a block reaches the state after it; None: in all blocks."""
        if self.most_cuts is None:
            return None
        return self.refs.documents.cuts[self.row, self.index * self.plan.blocks + block] == 0

    @property
    def corrects_decay(self) -> bool:
        """Whether q^tile replaces the product of a tile's decays, whose rounding errors add up.

        float32 outputs of slowly decaying channels show it: 2e-5 at |q| = 1 - 1e-5.
        """
        return self.plan.exact and self.most_cuts is None

    @property
    def in_first(self) -> Bool[Array, "J T"] | None:
        """Tokens that depend on the state before their block; None: all."""
        return None if self.most_cuts is None else self.refs.documents.piece[0] == 0

    @property
    def in_last(self) -> Bool[Array, "J T"] | None:
        """Tokens that the state after their block depends on; None: all."""
        return None if self.most_cuts is None else self.refs.documents.piece_from_end[0] == 0


def for_groups(plan: CemaTpuPlan, body: Callable[[Array], None]) -> None:
    """Runs `body` on every group of channels."""
    lax.fori_loop(0, plan.num_groups, lambda group, _: body(group), None, unroll=plan.unroll)


def run_tile(
    compute: Callable[[CemaTpuTile], None],
    refs: Any,
    plan: CemaTpuPlan,
    row: Array,
    index: Array,
) -> None:
    """Runs `compute` on a tile, without masks where the tile has no boundaries."""
    if refs.documents.most_cuts is None:
        compute(CemaTpuTile(refs, plan, row, index, None))
        return
    most_cuts = refs.documents.most_cuts[row, index]

    @pl.when(most_cuts == 0)
    def _without_boundaries() -> None:
        compute(CemaTpuTile(refs, plan, row, index, None))

    @pl.when(most_cuts > 0)
    def _with_boundaries() -> None:
        compute(CemaTpuTile(refs, plan, row, index, most_cuts))


def multiply_by_toeplitz(
    tile: CemaTpuTile, tokens: Float[Array, "J T"], matrix: tuple[Array, ...], piece: Any
) -> Float[Array, "J T"]:
    """Sums over lags inside segment pieces, for one channel.

    Args:
      tile: the grid step.
      tokens: the channel's tokens.
      matrix: terms of the (T, T) Toeplitz matrix of the taps.
      piece: reference of the tokens' pieces, counted so that no token of a higher piece contributes
        to piece 0.
    """
    plan = tile.plan
    # Piece 0 needs no mask.
    sums = layout.multiply(layout.stack([tokens], plan), matrix, (1, 0), plan)
    if tile.most_cuts is None:
        return sums

    def replace(number: Array, sums: Array) -> Array:
        is_own = piece[0] == number
        own = layout.stack([jnp.where(is_own, tokens, 0.0)], plan)
        return jnp.where(is_own, layout.multiply(own, matrix, (1, 0), plan), sums)

    return lax.fori_loop(1, tile.most_cuts + 1, replace, sums)
