"""The streaming cache: its size is independent of the context length."""

import dataclasses
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding

from megalodon_jax.config import ModelConfig
from megalodon_jax.parallel.sharding import partition_spec
from megalodon_jax.typing import Array, Bool, Float32, Int32
from pallas_kernels.chunk_attention import KeyValueCache
from pallas_kernels.timestep_norm import TimestepNormState

MAX_POSITION = int(np.iinfo(np.int32).max)


class LayerCache(NamedTuple):
    """The streaming state of one block; None where the model's configuration has no such state.

    Attributes:
      keys_and_values: keys (after RoPE) and values of the current chunk, (B, H, C, head width).
      norm: TimestepNorm's running moments.
      cema: CEMA's or EMA's state: N real parts, then N imaginary parts of every channel, see
        `pallas_kernels.state_step.unpack_state`.
    """

    keys_and_values: KeyValueCache
    norm: TimestepNormState | None
    cema: Float32[Array, "B 2N D"] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The streaming state of a model; a pytree of fixed shapes for `jit` and `scan`.

    `Megalodon.init_cache` creates it; every call of the model returns the updated cache. Rows may
    be at different positions.

    Attributes:
      position: tokens seen of each row's current document.
      segment: segment id of each row's current document, 0 before the first token.
      layers: the blocks' states, a leaf for each: a decoding step updates them in place.
      final_norm: running moments of the final TimestepNorm; None for another norm.
    """

    position: Int32[Array, " B"]
    segment: Int32[Array, " B"]
    layers: tuple[LayerCache, ...]
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

        def select(new: Array, old: Array) -> Array:
            return jnp.where(rows.reshape(-1, *[1] * (old.ndim - 1)), new, old)

        def select_states(new: LayerCache, old: LayerCache) -> LayerCache:
            norm, cema = jax.tree.map(select, (new.norm, new.cema), (old.norm, old.cema))
            return old._replace(norm=norm, cema=cema)

        layers = zip(initial.layers, self.layers, strict=True)
        return dataclasses.replace(
            self,
            position=select(initial.position, self.position),
            segment=select(initial.segment, self.segment),
            layers=tuple(select_states(new, old) for new, old in layers),
            final_norm=jax.tree.map(select, initial.final_norm, self.final_norm),
        )


def cache_shardings(mesh: Mesh, config: ModelConfig) -> Cache:
    """The shardings of a cache: rows over `replica` and `data`, features over `model`.

    Args:
      mesh: the mesh.
      config: of the model, for its layers and the states that they have.

    Returns:
      A `Cache` with a `NamedSharding` in place of every array, for `jax.device_put` and `jax.jit`.
    """

    def sharding(*names: str | None) -> NamedSharding:
        return NamedSharding(mesh, partition_spec(*names))

    groups, slots = sharding("batch", "norm_groups"), sharding("batch", "heads", None, None)
    norm: Any = None
    if config.time_norm == "timestep":
        norm = TimestepNormState(sharding("batch"), groups, groups)  # type: ignore[arg-type]
    cema: Any = None if config.moving_average == "none" else sharding("batch", None, "channels")
    layer = LayerCache(KeyValueCache(slots, slots), norm, cema)  # type: ignore[arg-type]
    layers = (layer,) * config.num_layers
    return Cache(sharding("batch"), sharding("batch"), layers, norm)  # type: ignore[arg-type]
