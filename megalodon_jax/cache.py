"""The streaming cache and its form between training steps: of one size at any context length."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding

from megalodon_jax.config import KvFormat, ModelConfig
from megalodon_jax.parallel.sharding import partition_spec
from megalodon_jax.typing import Array, Bool, Float32, Int32
from pallas_kernels.chunk_attention import Int8Slots, KeyValueCache
from pallas_kernels.timestep_norm import TimestepNormState

MAX_POSITION = int(np.iinfo(np.int32).max)


class LayerCache(NamedTuple):
    """The streaming state of one block; None where the model's configuration has no such state.

    Attributes:
      keys_and_values: keys (after RoPE) and values of the current chunk, (B, H, C, head width); of
        a cache for decoding with `kv="int8"`, 8-bit integers and scales (B, H, C).
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
        layers = zip(initial.layers, self.layers, strict=True)
        return _replace_rows(
            self, initial, rows, tuple(_replace_states(rows, new, old) for new, old in layers)
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CarriedState:
    """The streaming state of training rows between two batches (`data.carry_state`).

    It holds what a `Cache` holds, in the layout of a training step, so that nothing is copied
    between steps. No gradient passes through a state that a call of the model returns.

    Attributes:
      position: tokens seen of each row's current document.
      segment: segment id of each row's current document, 0 before the first token.
      layers: the blocks' states, stacked along a leading axis as their parameters are; a tuple of
        them for a model with `scan_layers = false`.
      final_norm: running moments of the final TimestepNorm; None for another norm.
    """

    position: Int32[Array, " B"]
    segment: Int32[Array, " B"]
    layers: LayerCache | tuple[LayerCache, ...]
    final_norm: TimestepNormState | None

    @classmethod
    def from_cache(cls, cache: Cache, *, stacked: bool) -> Self:
        """A cache as the state of training rows, with stacked layers or a tuple of them."""
        layers = jax.tree.map(_stack, *cache.layers) if stacked else cache.layers
        return cls(cache.position, cache.segment, layers, cache.final_norm)

    def with_layout(self, *, stacked: bool) -> Self:
        """The same state with stacked layers or with a tuple of them."""
        layers = self.layers
        if isinstance(layers, LayerCache):
            if stacked:
                return self
            count = layers.keys_and_values.key.shape[0]
            single = (jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(count))
            return dataclasses.replace(self, layers=tuple(single))
        if not stacked:
            return self
        return dataclasses.replace(self, layers=jax.tree.map(_stack, *layers))

    def check_room(self, length: int) -> None:
        """Does nothing: a training step starts documents anew before their position overflows."""

    def replace_rows(self, rows: Bool[Array, " B"], initial: Self) -> Self:
        """A copy in which the rows where `rows` is true come from `initial`, as in `Cache`."""
        if isinstance(self.layers, LayerCache):
            return _replace_rows(
                self, initial, rows, _replace_states(rows, initial.layers, self.layers, axis=1)
            )
        layers = zip(initial.layers, self.layers, strict=True)
        return _replace_rows(
            self, initial, rows, tuple(_replace_states(rows, new, old) for new, old in layers)
        )


def _stack(*leaves: Array) -> Array:
    return jnp.stack(leaves)


def _select_rows(rows: Bool[Array, " B"], new: Array, old: Array, *, axis: int = 0) -> Array:
    shape = [1] * old.ndim
    shape[axis] = -1
    return jnp.where(rows.reshape(shape), new, old)


def _replace_states(
    rows: Bool[Array, " B"], new: Any, old: LayerCache, *, axis: int = 0
) -> LayerCache:
    select = partial(_select_rows, rows, axis=axis)
    norm, cema = jax.tree.map(select, (new.norm, new.cema), (old.norm, old.cema))
    return old._replace(norm=norm, cema=cema)


def _replace_rows[C: Cache | CarriedState](
    cache: C, initial: C, rows: Bool[Array, " B"], layers: Any
) -> C:
    select = partial(_select_rows, rows)
    return dataclasses.replace(
        cache,
        position=select(initial.position, cache.position),
        segment=select(initial.segment, cache.segment),
        layers=layers,
        final_norm=jax.tree.map(select, initial.final_norm, cache.final_norm),
    )


def empty_keys_and_values(rows: int, config: ModelConfig, kv: KvFormat = "model") -> KeyValueCache:
    """Keys and values of one layer before the first token.

    Args:
      rows: number of rows.
      config: of the model.
      kv: their format, see `Megalodon.init_cache`.

    Raises:
      ValueError: there is no such format.
    """
    if kv not in ("model", "int8"):
        raise ValueError(f"kv is {kv!r}; use 'model' or 'int8'")
    shape = (rows, config.num_heads, config.chunk_size)

    def make(width: int) -> Any:
        if kv == "int8":
            return Int8Slots(jnp.zeros((*shape, width), jnp.int8), jnp.zeros(shape, jnp.float32))
        return jnp.zeros((*shape, width), jnp.dtype(config.dtype))

    return KeyValueCache(make(config.head_dim), make(config.value_head_dim))


def slot_specs(cache: KeyValueCache) -> KeyValueCache:
    """Partition specs of keys and values: rows over `replica` and `data`, heads over `model`."""
    return jax.tree.map(
        lambda leaf: partition_spec("batch", "heads", *[None] * (leaf.ndim - 2)), cache
    )


def kv_format(cache: Any) -> KvFormat:
    """The format of the keys and values of a cache of any model."""
    leaves = jax.tree.leaves(cache, is_leaf=lambda node: isinstance(node, Int8Slots))
    return "int8" if any(isinstance(leaf, Int8Slots) for leaf in leaves) else "model"


def cache_shardings(mesh: Mesh, config: ModelConfig) -> Cache:
    """The shardings of a cache: rows over `replica` and `data`, features over `model`.

    Args:
      mesh: the mesh.
      config: of the model, for its layers and the states that they have.

    Returns:
      A `Cache` with a `NamedSharding` in place of every array, for `jax.device_put` and `jax.jit`.
    """
    layers = (_layer_shardings(mesh, config),) * config.num_layers
    rows, norm = _sharding(mesh, "batch"), _norm_shardings(mesh, config)
    return Cache(rows, rows, layers, norm)  # type: ignore[arg-type]


def carried_shardings(mesh: Mesh, config: ModelConfig) -> CarriedState:
    """The shardings of a `CarriedState`, as `cache_shardings`."""
    layers: Any = (_layer_shardings(mesh, config),) * config.num_layers
    if config.scan_layers:
        layers = _layer_shardings(mesh, config, None)
    rows, norm = _sharding(mesh, "batch"), _norm_shardings(mesh, config)
    return CarriedState(rows, rows, layers, norm)  # type: ignore[arg-type]


def _layer_shardings(mesh: Mesh, config: ModelConfig, *leading: str | None) -> LayerCache:
    slots = _sharding(mesh, *leading, "batch", "heads", None, None)
    cema: Any = None
    if config.moving_average != "none":
        cema = _sharding(mesh, *leading, "batch", None, "channels")
    norm = _norm_shardings(mesh, config, *leading)
    return LayerCache(KeyValueCache(slots, slots), norm, cema)  # type: ignore[arg-type]


def _norm_shardings(mesh: Mesh, config: ModelConfig, *leading: str | None) -> Any:
    if config.time_norm != "timestep":
        return None
    groups = _sharding(mesh, *leading, "batch", "norm_groups")
    return TimestepNormState(_sharding(mesh, *leading, "batch"), groups, groups)  # type: ignore[arg-type]


def _sharding(mesh: Mesh, *names: str | None) -> NamedSharding:
    return NamedSharding(mesh, partition_spec(*names))
