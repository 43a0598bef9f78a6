"""Sizes, operands and results of the kernels that split rows in time.

A backend provides four kernels, and those that merge what splits pass to each other, or XLA's
program for that (`TimestepNormKernels`); everything around them is shared.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Float, Int32

# Tokens of a tile.
TILE = 128
# Flags of a token; see `TimestepNormDocuments`.
VALID, DOCUMENT_START, LATER_DOCUMENT, FEEDS_NEXT_SPLIT, FEEDS_PREVIOUS_SPLIT = 1, 2, 4, 8, 16
# Rows of `TimestepNormDocuments.token_info`.
COUNT, FROM_START, TO_END, FLAGS = range(4)


class TimestepNormDocuments(NamedTuple):
    """Documents of packed rows, as the kernels read them.

    Attributes:
      token_info: for every tile and token: count after it, tokens since its document's first,
        tokens to its document's last, and flags. VALID: not padding. DOCUMENT_START: a document's
        first token. LATER_DOCUMENT: in all documents but the row's first. FEEDS_NEXT_SPLIT: no
        document of its split starts after it. FEEDS_PREVIOUS_SPLIT: its document started before
        its split, or is the row's first.
      has_start: DOCUMENT_START if a document starts in a tile, else 0.
      initial: mean and count * variance that the row's first document starts from, then those that
        later documents start from.
      has_initial: whether the count of the former, and of the latter, is above 0; 0 or 1.
    """

    token_info: Int32[jax.Array, "B tiles 4 128"]
    has_start: Int32[jax.Array, "B tiles"]
    initial: Float[jax.Array, "B G 4"]
    has_initial: Int32[jax.Array, "B 2"]


class KernelInputs(NamedTuple):
    """Operands of a kernel in global memory; None where a kernel has no use for one.

    Attributes:
      x: (B, L, D), groups padded to `geometry.width` features.
      documents: documents of packed rows; None if every row is one document without padding.
      initial_count: (B,) tokens before the row; used by rows that are not packed.
      scale: (D,).
      bias: (D,).
      previous_states: (B, S, G, 3) pivot, sum around it and squares before every split.
      next_slopes: (B, S, G, 2) slopes S and T after every split.
      dy: (B, L, D) cotangent of y.
      statistics: (B, G, tiles, 2 or 3, 128) offset a, r and, if packed, pivot k of every token.
      pivots: (B, S, G) pivot of every split, in rows that are not packed.
    """

    x: Any
    documents: TimestepNormDocuments | None
    initial_count: Any
    scale: Any = None
    bias: Any = None
    previous_states: Any = None
    next_slopes: Any = None
    dy: Any = None
    statistics: Any = None
    pivots: Any = None


class TimestepNormGeometry(NamedTuple):
    """Static sizes of a call.

    Attributes:
      rows: rows B.
      tiles: tiles of a row.
      tiles_per_split: tiles of every split but the last, which may be shorter.
      groups: groups G.
      groups_per_block: groups that one block works on.
      features: features of a group.
      width: features of a group with padding.
    """

    rows: int
    tiles: int
    tiles_per_split: int
    groups: int
    groups_per_block: int
    features: int
    width: int

    @property
    def splits(self) -> int:
        """Splits of a row."""
        return -(-self.tiles // self.tiles_per_split)

    @property
    def block_width(self) -> int:
        """Features of a block."""
        return self.groups_per_block * self.width


class Outputs(NamedTuple):
    """Results of `timestep_norm_outputs`, or their shapes; None if not saved.

    Attributes:
      y: (B, L, D) normalized.
      final_moments: mean and variance after every row's last token, (B, G) each; as the Hopper
        kernel writes them (B, G, 2, 128), after each token of the row's last tile.
      statistics: for the backward pass; see `KernelInputs`.
      pivots: likewise.
    """

    y: Any
    final_moments: Any
    statistics: Any
    pivots: Any


class Gradients(NamedTuple):
    """Results of `timestep_norm_gradients`, or their shapes.

    Attributes:
      dx: (B, L, D) gradient of x.
      affine: gradients of scale and bias, (D,) each; as kernels write them (B, S, 2, D), from every
        split.
      initial: (B, S, G, 2) S and T at every split's first token. In packed rows (B, S, G, 4): S and
        T summed over the tokens that start a row's first document, then over those that start
        later ones.
    """

    dx: Any
    affine: Any
    initial: Any


class TimestepNormKernels(NamedTuple):
    """The launches of a backend.

    Attributes:
      moments: (options, inputs, num_splits) to summaries (B, J, G, 4) of the first splits: count,
        pivot, offset of the mean, squares. In packed rows of the tokens that feed the next split.
      outputs: (options, inputs, save_statistics=...) to `Outputs`; statistics and pivots are what
        the backward kernels read, or None.
      slopes: (options, inputs, first_split=...) to slopes S and T (B, J, G, 2) of the splits from
        `first_split` on.
      gradients: (options, inputs) to `Gradients`.
      token_info: as `documents.pack_token_info`, before all others.
      previous_states: as `state_passing.previous_states`, between `moments` and `outputs`.
      next_slopes: as `state_passing.next_slopes`, between `slopes` and `gradients`.
    """

    moments: Callable[..., Any]
    outputs: Callable[..., Outputs]
    slopes: Callable[..., Any]
    gradients: Callable[..., Gradients]
    token_info: Callable[..., Any]
    previous_states: Callable[..., Any]
    next_slopes: Callable[..., Any]


class TimestepNormGpuOptions(NamedTuple):
    """Static choices of a call.

    Attributes:
      kernels: of the backend.
      eps: added to the variance.
      geometry: sizes.
      interpret: runs the kernels without their device, as the backend's launcher takes it.
      starts_empty: whether all documents are known to start from a count of 0.
    """

    kernels: TimestepNormKernels
    eps: float
    geometry: TimestepNormGeometry
    interpret: Any
    starts_empty: bool = False
