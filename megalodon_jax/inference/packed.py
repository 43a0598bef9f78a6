"""Small NumPy arrays as one array: each transfer to a device takes as long as a few kernels."""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from megalodon_jax.typing import Array, Int32

_WORD = 4


class _Leaf(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed[T]:
    """The leaves of a tree one after the other, each from a word's beginning.

    Attributes:
      words: their bytes.
      structure: of the tree.
      leaves: shape and dtype of each leaf.
    """

    words: Int32[Array, " n"]
    structure: Any = dataclasses.field(metadata={"static": True})
    leaves: tuple[_Leaf, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, tree: T) -> "Packed[T]":
        """Packs NumPy arrays and scalars.

        Raises:
          ValueError: a leaf is neither bool nor of 32 bits.
        """
        leaves, structure = jax.tree.flatten(tree)
        described, pieces = [], []
        for leaf in map(np.asarray, leaves):
            if leaf.dtype.kind != "b" and leaf.dtype.itemsize != _WORD:
                raise ValueError(f"a leaf is {leaf.dtype}; pack bool and dtypes of 32 bits")
            described.append(_Leaf(leaf.shape, leaf.dtype))
            data = leaf.tobytes()
            pieces.append(data.ljust(_num_words(len(data)) * _WORD, b"\0"))
        words: Any = np.frombuffer(b"".join(pieces), np.int32)
        return cls(words, structure, tuple(described))

    def unpack(self) -> T:
        """The tree; call it inside `jit`."""
        leaves, start = [], 0
        for shape, dtype in self.leaves:
            size = int(np.prod(shape))
            count = _num_words(size * dtype.itemsize)
            words = self.words[start : start + count]
            if dtype.kind == "b":
                flat = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)[:size] != 0
            else:
                flat = jax.lax.bitcast_convert_type(words, dtype)
            leaves.append(flat.reshape(shape))
            start += count
        return jax.tree.unflatten(self.structure, leaves)


def _num_words(num_bytes: int) -> int:
    return -(-num_bytes // _WORD)
