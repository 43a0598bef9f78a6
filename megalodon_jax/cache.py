"""The streaming cache: its size is independent of the context length."""

import dataclasses
from typing import NamedTuple, Self

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding

from megalodon_jax.config import ModelConfig
from megalodon_jax.parallel.sharding import partition_spec
from megalodon_jax.typing import Array, Bool, Complex64, Int32
from pallas_kernels.chunk_attention import KeyValueCache
from pallas_kernels.timestep_norm import TimestepNormState

MAX_POSITION = int(np.iinfo(np.int32).max)


class LayerCache(NamedTuple):
    """The streaming state of one block; None where the model's configuration has no such state.

    Attributes:
      keys_and_values: keys (after RoPE) and values of the current chunk, C slots.
      norm: TimestepNorm's running moments.
      cema: CEMA's or EMA's complex state.
    """

    keys_and_values: KeyValueCache
    norm: TimestepNormState | None
    cema: Complex64[Array, "B D N"] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The streaming state of a model; a pytree of fixed shapes for `jit` and `scan`.

    `Megalodon.init_cache` creates it; every call of the model returns the updated cache. Rows may
    be at different positions.

    Attributes:
      position: tokens seen of each row's current document.
      segment: segment id of each row's current document, 0 before the first token.
      layers: the blocks' states, stacked along a leading layer axis.
      final_norm: running moments of the final TimestepNorm; None for another norm.
    """

    position: Int32[Array, " B"]
    segment: Int32[Array, " B"]
    layers: LayerCache
    final_norm: TimestepNormState | None

    def check_room(self, length: int) -> None:
        """Raises OverflowError if `length` more tokens overflow the 32-bit position.

        Call it outside `jit`: it reads the positions on the host.
        """
        position = int(np.max(np.asarray(self.position)))
        if position + length > MAX_POSITION:
            raise OverflowError(
                f"{length} more tokens after position {position} exceed the largest 32-bit "
                f"position {MAX_POSITION}; start a new document (Megalodon.reset_rows) first"
            )

    def replace_rows(self, rows: Bool[Array, " B"], initial: Self) -> Self:
        """A copy of this cache in which the rows where `rows` is true come from `initial`.

        Keys and values are not replaced, because a row at position 0 reads none of them.
        """

        def select_rows(axis: int):
            def select(new: Array, old: Array) -> Array:
                shape = [1] * old.ndim
                shape[axis] = -1
                return jnp.where(rows.reshape(shape), new, old)

            return select

        return dataclasses.replace(
            self,
            position=select_rows(0)(initial.position, self.position),
            segment=select_rows(0)(initial.segment, self.segment),
            layers=self.layers._replace(
                norm=jax.tree.map(select_rows(1), initial.layers.norm, self.layers.norm),
                cema=jax.tree.map(select_rows(1), initial.layers.cema, self.layers.cema),
            ),
            final_norm=jax.tree.map(select_rows(0), initial.final_norm, self.final_norm),
        )


def cache_shardings(mesh: Mesh, config: ModelConfig | None = None) -> Cache:
    """The shardings of a cache: rows over `replica` and `data`, features over `model`.

    Args:
      mesh: the mesh.
      config: of the model, for the states that it has; None: all states.

    Returns:
      A `Cache` with a `NamedSharding` in place of every array, for `jax.device_put` and `jax.jit`.
    """

    def sharding(*names: str | None) -> NamedSharding:
        return NamedSharding(mesh, partition_spec(*names))

    config = ModelConfig() if config is None else config

    def moments(*layers: str) -> TimestepNormState | None:
        if config.time_norm != "timestep":
            return None
        groups = sharding(*layers, "batch", "norm_groups")
        return TimestepNormState(sharding(*layers, "batch"), groups, groups)  # type: ignore[arg-type]

    slots = sharding("layers", "batch", None, "heads", None)
    states = sharding("layers", "batch", "channels", None)
    layers = LayerCache(
        KeyValueCache(slots, slots),  # type: ignore[arg-type]
        moments("layers"),
        None if config.moving_average == "none" else states,  # type: ignore[arg-type]
    )
    return Cache(sharding("batch"), sharding("batch"), layers, moments())  # type: ignore[arg-type]
