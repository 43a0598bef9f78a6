"""CEMA's parameters and results.

B batch, L length, D channels (model width), N orders of every channel.
"""

from typing import NamedTuple

from jaxtyping import Array, Complex, Float


class CemaParams(NamedTuple):
    """CEMA's parameters under their released names; float32, or float64 to compute in float64.

    Attributes:
      alpha: logit of the input weight p.
      delta: logit of the damping factor.
      theta: logit of the base frequency, in revolutions over N.
      gamma: output weights, [..., 0] real and [..., 1] imaginary.
      omega: weight of the direct path.
    """

    alpha: Float[Array, "D N"]
    delta: Float[Array, "D N"]
    theta: Float[Array, " D"]
    gamma: Float[Array, "D N 2"]
    omega: Float[Array, " D"]


class CemaOutput(NamedTuple):
    """Result of `cema`.

    Attributes:
      y: output, in the input's dtype.
      final_state: h after each row's last token that is not padding; complex64, complex128 for
        float64 parameters.
    """

    y: Float[Array, "B L D"]
    final_state: Complex[Array, "B D N"]
