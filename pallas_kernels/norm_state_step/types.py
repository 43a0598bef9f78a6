"""Operands and results of TimestepNorm and CEMA of one token or a few tokens a row.

B rows, T tokens of a row, S >= B rows of the states, D channels, G groups of F = D/G channels, N
orders.
"""

from typing import Literal, NamedTuple

from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.timestep_norm.types import TimestepNormState


class StepNorm(NamedTuple):
    """TimestepNorm's parameters.

    Attributes:
      scale: multiplies the normalized token; None: 1.
      bias: added to it; None: 0.
      num_groups: groups G; divides D.
      eps: added to the variance.
    """

    scale: Float32[Array, " D"] | None
    bias: Float32[Array, " D"] | None
    num_groups: int
    eps: float


Counts = Int32[Array, " B"] | Literal[0] | None
"""Tokens of each row after which its states are kept; None: all; the number 0: none of any row."""


class TargetRows(NamedTuple):
    """States that take the next ones, where those before the tokens are to stay.

    Attributes:
      norm: moments of S rows.
      state: CEMA's state of S rows.
      first_row: index of the row for row 0, at most S - B; row i goes to first_row + i.
    """

    norm: TimestepNormState
    state: Float[Array, "S 2N D"]
    first_row: Int32[Array, ""] | int


class NormStateStepOutput(NamedTuple):
    """Result of `norm_state_step`, and of `norm_state_steps` with an axis of tokens.

    Attributes:
      u: normalized tokens, in the input's dtype.
      y: CEMA's outputs of u, in the input's dtype.
      norm: the moments with rows 0..B-1, or the target's rows, after their tokens.
      state: CEMA's state with the same rows after their tokens.
    """

    u: Float[Array, "B *T D"]
    y: Float[Array, "B *T D"]
    norm: TimestepNormState
    state: Float[Array, "S 2N D"]
