"""Sizes, memory layout and results of the kernels that split rows in time.

A backend provides three kernels (`CemaKernels`); everything around them is shared.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float

# Channels of a block: one per thread of four warps.
CHANNELS = 128
# Tokens of a tile; an int32 has one bit for each of them.
TILE = 32


class CemaGeometry(NamedTuple):
    """Static sizes of a call.

    Attributes:
      rows: B.
      tiles: L / TILE.
      channel_blocks: D / CHANNELS.
      order: N.
      tiles_per_split: of every split but the last, which may be shorter.
    """

    rows: int
    tiles: int
    channel_blocks: int
    order: int
    tiles_per_split: int

    @property
    def splits(self) -> int:
        """Splits of a row."""
        return -(-self.tiles // self.tiles_per_split)

    def per_channel(self, *shape: int) -> jax.ShapeDtypeStruct:
        """float32 (B, *shape, D)."""
        width = self.channel_blocks * CHANNELS
        return jax.ShapeDtypeStruct((self.rows, *shape, width), jnp.float32)


class CemaForwardResults(NamedTuple):
    """Results of the output kernel, or their shapes; states are divided by p.

    Attributes:
      y: the output.
      final_state: the state after every row; undefined in a packed row without tokens.
      previous_states: the state before every split, or None.
    """

    y: Any  # (B L D)
    final_state: Any  # (B 2 N D)
    previous_states: Any  # (B S 2 N D)


class CemaGradientSums(NamedTuple):
    """Results of the gradient kernel, or their shapes.

    Attributes:
      dx: gradient of x.
      x_e: Σ x e of every split.
      x_k: Σ x k of every split, with q h k of its first token.
      x_dy: Σ x dy of every split.
      first_e: e at the row's first token; undefined in a packed row without tokens.
      first_k: k at the row's first token, of its own split only.
    """

    dx: Any  # (B L D)
    x_e: Any  # (B S 2 N D)
    x_k: Any  # (B S 2 N D)
    x_dy: Any  # (B S D)
    first_e: Any  # (B 2 N D)
    first_k: Any  # (B 2 N D)


class LaunchSummaries(Protocol):
    """The state that every split of `splits` adds, divided by p.

    `backward` runs backward in time: x is dy, and the result the adjoint state e at the split's
    first token. operands has the initial state if there is one: a row's first document starts from
    it, which after left padding happens inside a split.
    """

    def __call__(
        self,
        x: Float[Array, "B L D"],
        operands: Any,
        geometry: CemaGeometry,
        *,
        splits: range,
        backward: bool,
        interpret: Any,
    ) -> Float[Array, "B S 2 N D"]: ...


class LaunchOutputs(Protocol):
    """y in `out_dtype`, the final state and, if asked for, the state before every split.

    operands has the initial state, and the summaries of all splits (but the last) if there are
    several.
    """

    def __call__(
        self,
        x: Float[Array, "B L D"],
        operands: Any,
        geometry: CemaGeometry,
        *,
        out_dtype: Any,
        save_split_states: bool,
        interpret: Any,
    ) -> CemaForwardResults: ...


class LaunchGradients(Protocol):
    """dx in `out_dtype`, and the sums that the gradients of the parameters are made of.

    operands has the states before the splits; `initial` is e at the token after every row, if it is
    not zero; `summaries` those of dy for all splits but the first, if there are several.
    """

    def __call__(
        self,
        x: Float[Array, "B L D"],
        dy: Float[Array, "B L D"],
        operands: Any,
        geometry: CemaGeometry,
        *,
        out_dtype: Any,
        interpret: Any,
    ) -> CemaGradientSums: ...


class CemaKernels(NamedTuple):
    """The kernels of a backend; `tables.CemaOperands` are their operands beside the sequences."""

    summaries: LaunchSummaries
    outputs: LaunchOutputs
    gradients: LaunchGradients


def to_rows(z: Complex[Array, "*S D N"]) -> Float[Array, "*S 2 N D"]:
    """Complex states in the kernels' memory layout: channels are contiguous."""
    return jnp.swapaxes(jnp.stack([z.real, z.imag], axis=-3), -1, -2)


def from_rows(a: Float[Array, "*S 2 N D"]) -> Complex[Array, "*S D N"]:
    """The inverse of `to_rows`."""
    a = jnp.swapaxes(a, -1, -2)
    return jax.lax.complex(a[..., 0, :, :], a[..., 1, :, :])
