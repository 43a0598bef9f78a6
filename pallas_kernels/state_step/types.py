"""Coefficients and result of a step of CEMA.

B rows, S >= B rows of the state, D channels, N orders of every channel.
"""

from typing import NamedTuple

from jaxtyping import Array, Float


class CemaStepTables(NamedTuple):
    """CEMA's coefficients with channels last; float32, or float64 to compute in float64.

    Attributes:
      q_re: real part of the state's factor q.
      q_im: imaginary part of q.
      p: weight of the input.
      g_re: real part of the output weight gamma / √N.
      g_im: imaginary part of the output weight.
      omega: weight of the direct path.
    """

    q_re: Float[Array, "N D"]
    q_im: Float[Array, "N D"]
    p: Float[Array, "N D"]
    g_re: Float[Array, "N D"]
    g_im: Float[Array, "N D"]
    omega: Float[Array, " D"]


class StateStepOutput(NamedTuple):
    """Result of `state_step`.

    Attributes:
      y: output, in the input's dtype.
      state: the state with rows 0..B-1 after their token.
    """

    y: Float[Array, "B D"]
    state: Float[Array, "S 2N D"]
