"""Operands and results of TimestepNorm and CEMA of one token a row.

B rows, S >= B rows of the states, D channels, G groups of F = D/G channels, N orders.
"""

from typing import NamedTuple

from jaxtyping import Array, Float, Float32

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


class NormStateStepOutput(NamedTuple):
    """Result of `norm_state_step`.

    Attributes:
      u: normalized tokens, in the input's dtype.
      y: CEMA's outputs of u, in the input's dtype.
      norm: the moments with rows 0..B-1 after their token.
      state: CEMA's state with rows 0..B-1 after their token.
    """

    u: Float[Array, "B D"]
    y: Float[Array, "B D"]
    norm: TimestepNormState
    state: Float[Array, "S 2N D"]
