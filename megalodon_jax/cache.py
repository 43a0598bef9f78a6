"""The streaming state: of constant size, whatever the length of the context."""

import dataclasses
from typing import NamedTuple, Self

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding

from megalodon_jax.parallel.sharding import partition_spec
from megalodon_jax.typing import Array, Bool, Complex64, Int32
from pallas_kernels.chunk_attention import KeyValueCache
from pallas_kernels.timestep_norm import TimestepNormState

MAX_POSITION = int(np.iinfo(np.int32).max)


class LayerCache(NamedTuple):
    """What one block remembers of the tokens before.

    Attributes:
      keys_and_values: the current chunk's keys (after RoPE) and values, at most C tokens.
      norm: TimestepNorm's running moments.
      cema: CEMA's complex state.
    """

    keys_and_values: KeyValueCache
    norm: TimestepNormState
    cema: Complex64[Array, "B D N"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What a model remembers of every row; a pytree of fixed shapes, usable in `jit` and `scan`.

    Rows may be at different positions. `Megalodon.init_cache` makes it, calling the model moves it
    on.

    Attributes:
      position: tokens of its current document that each row has seen.
      segment: the current document's segment id in each row, 0 before the first token.
      layers: every block's state, stacked along a leading layer axis.
      final_norm: the last TimestepNorm's running moments.
    """

    position: Int32[Array, " B"]
    segment: Int32[Array, " B"]
    layers: LayerCache
    final_norm: TimestepNormState

    def check_room(self, length: int) -> None:
        """Raises OverflowError when `length` more tokens would pass the 32-bit token counter.

        Call it outside `jit`, where positions are known.
        """
        position = int(np.max(np.asarray(self.position)))
        if position + length > MAX_POSITION:
            raise OverflowError(
                f"{length} more tokens after {position} pass the cache's counter, which ends at "
                f"{MAX_POSITION}; start a new document (Megalodon.reset_rows) before that"
            )

    def replace_rows(self, rows: Bool[Array, " B"], fresh: Self) -> Self:
        """This cache with the rows where `rows` is true taken from `fresh`.

        Keys and values stay: at position 0 none of them is read.
        """

        def pick(axis: int):
            def choose(new: Array, old: Array) -> Array:
                shape = [1] * old.ndim
                shape[axis] = -1
                return jnp.where(rows.reshape(shape), new, old)

            return choose

        return dataclasses.replace(
            self,
            position=pick(0)(fresh.position, self.position),
            segment=pick(0)(fresh.segment, self.segment),
            layers=self.layers._replace(
                norm=jax.tree.map(pick(1), fresh.layers.norm, self.layers.norm),
                cema=pick(1)(fresh.layers.cema, self.layers.cema),
            ),
            final_norm=jax.tree.map(pick(0), fresh.final_norm, self.final_norm),
        )


def cache_shardings(mesh: Mesh) -> Cache:
    """Where a cache's arrays go on a mesh: rows over `replica` and `data`, features over `model`.

    A `NamedSharding` in place of every array, for `jax.device_put` and `jax.jit`.
    """

    def place(*names: str | None) -> NamedSharding:
        return NamedSharding(mesh, partition_spec(*names))

    def moments(*layers: str) -> TimestepNormState:
        groups = place(*layers, "batch", "norm_groups")
        return TimestepNormState(place(*layers, "batch"), groups, groups)  # type: ignore[arg-type]

    slots = place("layers", "batch", None, "heads", None)
    layers = LayerCache(
        KeyValueCache(slots, slots),  # type: ignore[arg-type]
        moments("layers"),
        place("layers", "batch", "channels", None),  # type: ignore[arg-type]
    )
    return Cache(place("batch"), place("batch"), layers, moments())  # type: ignore[arg-type]
