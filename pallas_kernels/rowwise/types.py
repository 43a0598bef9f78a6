"""The row operations by name, and what an implementation of them provides.

R leading axes of rows, W width of a row.
"""

from typing import Any, Literal, Protocol

from jaxtyping import Array, Float

RowwiseOperation = Literal["rms_norm", "layer_norm", "silu", "silu_gate"]
# Operations with sums over a row; the others are gates, which work on every number alone.
NORMS: tuple[RowwiseOperation, ...] = ("rms_norm", "layer_norm")

# Rows of one shape and vectors of their width, in the order of an operation's arguments. None
# stands for an argument that is not given; the first rows always are.
Rows = tuple[Float[Array, "*R W"], *tuple[Float[Array, "*R W"] | None, ...]]
Vectors = tuple[Float[Array, " W"] | None, ...]


class RowwiseImplementation(Protocol):
    """The four operations; a module with these functions is an implementation.

    Arguments as in `api`, without defaults.
    """

    def rms_norm(
        self, x: Float[Array, "*R W"], scale: Float[Array, " W"] | None, *, eps: float, dtype: Any
    ) -> Float[Array, "*R W"]:
        """x / sqrt(mean(x^2) + eps) * scale."""
        ...

    def layer_norm(
        self,
        x: Float[Array, "*R W"],
        scale: Float[Array, " W"] | None,
        bias: Float[Array, " W"] | None,
        *,
        added: Float[Array, "*R W"] | None,
        offset: Float[Array, " W"] | None,
        eps: float,
        dtype: Any,
    ) -> Float[Array, "*R W"]:
        """(z - mean) / sqrt(var + eps) * scale + bias of z = x + added + offset."""
        ...

    def silu(
        self, x: Float[Array, "*R W"], bias: Float[Array, " W"] | None, *, dtype: Any
    ) -> Float[Array, "*R W"]:
        """z * sigmoid(z) of z = x + bias."""
        ...

    def silu_gate(
        self,
        x: Float[Array, "*R W"],
        bias: Float[Array, " W"] | None,
        y: Float[Array, "*R W"],
        *,
        dtype: Any,
    ) -> Float[Array, "*R W"]:
        """y * silu(x + bias)."""
        ...
