"""Sessions: the state of a conversation between requests, in memory and in files."""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.cache import Cache, kv_format
from megalodon_jax.config import AnyModelConfig, KvFormat
from megalodon_jax.errors import SessionError
from pallas_kernels.chunk_attention import KeyValueCache

_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Session:
    """The state after some tokens, on the host; immutable: any number of requests may start there.

    At a chunk border no key or value is left in it: 1.6 MB for mega200M, whatever the number of
    tokens.

    Attributes:
      cache: one row; keys and values hold the filled slots alone.
      pending: tokens that belong to the session but have not been through the model: the next
        request feeds them before its prompt.
      fingerprint: of the model, see `fingerprint`.
    """

    cache: Any
    pending: tuple[int, ...]
    fingerprint: str

    @classmethod
    def take(cls, cache: Any, pending: Sequence[int], fingerprint: str) -> "Session":
        """The session of a row's cache (leaves with a leading axis of 1)."""
        host = jax.device_get(cache)
        filled = filled_slots(host)
        return cls(
            _map_slots(lambda slots: slots[:, :, :filled].copy(), host), tuple(pending), fingerprint
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of the session, the pending ones included."""
        return int(self.cache.position[0]) + len(self.pending)

    @property
    def num_bytes(self) -> int:
        """Size of the state."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.cache))

    def with_pending(self, tokens: Sequence[int]) -> "Session":
        """The session with more tokens that have not been through the model."""
        return dataclasses.replace(self, pending=(*self.pending, *tokens))

    def check(self, fingerprint: str, kv: KvFormat) -> None:
        """Raises SessionError unless the session fits a model and its format of keys and values."""
        if self.fingerprint != fingerprint:
            raise SessionError("the session belongs to another model or to other weights")
        _check_format("the session", kv_format(self.cache), kv)

    def restore(self, empty: Any) -> Any:
        """The row's cache on the device.

        Args:
          empty: a cache of the model with one row.

        Raises:
          SessionError: the cache has other shapes.
        """

        def place(new: np.ndarray, old: jax.Array) -> jax.Array:
            padding = [(0, size - given) for size, given in zip(old.shape, new.shape, strict=True)]
            if new.dtype != old.dtype or min(after for _, after in padding) < 0:
                raise SessionError(
                    f"the session has {new.dtype}{new.shape}, the model's cache {old.dtype}"
                    f"{old.shape}: it belongs to another model or an engine with fewer slots"
                )
            return jnp.asarray(np.pad(new, padding), device=old.sharding)

        if jax.tree.structure(self.cache) != jax.tree.structure(empty):
            raise SessionError("the session belongs to a model with other layers")
        return jax.tree.map(place, self.cache, empty)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the session to a .safetensors file, at once or not at all."""
        from safetensors.numpy import save_file

        arrays = _named_leaves(self.cache)
        metadata = {
            "format": str(_FORMAT),
            "model": self.fingerprint,
            "pending": json.dumps(list(self.pending)),
            "sha256": _checksum(arrays, self.pending),
            "dtypes": json.dumps({name: str(array.dtype) for name, array in arrays.items()}),
        }
        path = Path(path)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            file = Path(folder) / "session"
            save_file({name: _as_bits(array) for name, array in arrays.items()}, file, metadata)
            file.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], empty: Any, fingerprint: str) -> "Session":
        """Reads a session; `Engine.load_session` passes the last two arguments.

        Args:
          path: a file of `save`.
          empty: a cache of the model with one row.
          fingerprint: of the model.

        Raises:
          SessionError: the file is damaged, or the session belongs to another model or another
            format of keys and values.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(os.fspath(path), "numpy") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise SessionError(f"{path} cannot be read as a session: {error}") from error
        return _from_file(str(path), arrays, metadata, empty, fingerprint)


def fingerprint(config: AnyModelConfig, params: nnx.State) -> str:
    """SHA-256 of a model's configuration and weights.

    The weights enter by sums of their bits modulo 2^32, which do not depend on the order of the sum
    or on how the arrays are sharded.
    """
    sums = jax.device_get(_bit_sums(params))
    described = json.dumps(dataclasses.asdict(config), sort_keys=True, default=str)
    return hashlib.sha256(described.encode() + np.asarray(sums, "<u4").tobytes()).hexdigest()


@jax.jit
def _bit_sums(params: nnx.State) -> list[jax.Array]:
    def bit_sum(leaf: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(leaf, f"uint{leaf.dtype.itemsize * 8}")
        bits = bits.astype(jnp.uint32).reshape(-1)
        # Weights by position: two exchanged numbers change the sum.
        return jnp.sum(bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)

    return [bit_sum(leaf) for leaf in jax.tree.leaves(params)]


def _check_format(name: str, kv: KvFormat, expected: KvFormat) -> None:
    if kv != expected:
        raise SessionError(
            f"{name} has keys and values in the format {kv!r}, the engine in {expected!r}; use an "
            f"engine with kv={kv!r}"
        )


def filled_slots(cache: Any) -> int:
    """Slots of a row's keys and values that hold a token that can still be seen."""
    position = int(cache.position[0])
    if isinstance(cache, Cache):
        return position % cache.layers[0].keys_and_values.key.shape[2]
    return min(position, cache.num_slots)


def _map_slots(function: Any, cache: Any) -> Any:
    def is_slots(node: Any) -> bool:
        return isinstance(node, KeyValueCache)

    def apply(node: Any) -> Any:
        return jax.tree.map(function, node) if is_slots(node) else node

    return jax.tree.map(apply, cache, is_leaf=is_slots)


def _named_leaves(cache: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(cache)
    return {jax.tree_util.keystr(path): np.ascontiguousarray(leaf) for path, leaf in leaves}


def _as_bits(array: np.ndarray) -> np.ndarray:
    """safetensors' NumPy form has no bfloat16."""
    return array.view(f"uint{array.dtype.itemsize * 8}")


def _checksum(arrays: dict[str, np.ndarray], pending: Sequence[int]) -> str:
    hasher = hashlib.sha256(json.dumps(list(pending)).encode())
    for name in sorted(arrays):
        array = arrays[name]
        hasher.update(f"{name} {array.dtype} {array.shape}".encode())
        hasher.update(array.tobytes())
    return hasher.hexdigest()


def _from_file(
    path: str, arrays: dict[str, np.ndarray], metadata: dict[str, str], empty: Any, expected: str
) -> Session:
    damaged = SessionError(f"{path} is damaged, or no session of this version")
    try:
        is_known = int(metadata["format"]) == _FORMAT
        dtypes = {name: jnp.dtype(dtype) for name, dtype in json.loads(metadata["dtypes"]).items()}
        pending = tuple(int(token) for token in json.loads(metadata["pending"]))
        arrays = {name: array.view(dtypes[name]) for name, array in arrays.items()}
        checksum, model = metadata["sha256"], metadata["model"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged from error
    if not is_known or checksum != _checksum(arrays, pending):
        raise damaged
    if model != expected:
        raise SessionError(f"{path} is a session of another model or of other weights")
    paths, structure = jax.tree_util.tree_flatten_with_path(empty)
    names = [jax.tree_util.keystr(path) for path, _ in paths]
    if set(names) != arrays.keys():
        is_int8 = any(array.dtype == np.int8 for array in arrays.values())
        _check_format(path, "int8" if is_int8 else "model", kv_format(empty))
        raise damaged
    cache = jax.tree.unflatten(structure, [arrays[name] for name in names])
    return Session(cache, pending, model)
