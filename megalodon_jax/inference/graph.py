"""A model's structure as a static argument of the programs of prefill."""

import weakref
from typing import Any, Self

from flax import nnx


class HashedGraphDef(nnx.GraphDef[Any]):
    """A graphdef whose hash is computed once.

    `jax.jit` hashes and compares its static arguments in every call, and a graphdef walks through
    all of its nodes: half a millisecond for mega200M, of the six before a first token.
    """

    __slots__ = ("__weakref__", "_hash")

    def __init__(self, graphdef: nnx.GraphDef[Any]):
        super().__init__(graphdef.nodes, graphdef.attributes, graphdef.num_leaves)
        object.__setattr__(self, "_hash", hash(graphdef))

    @classmethod
    def of(cls, graphdef: nnx.GraphDef[Any]) -> Self:
        """The same object for equal structures: comparing two takes 0.1 ms in every call."""
        new = cls(graphdef)
        return _interned.setdefault(new, new)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, HashedGraphDef) and (
            (self.nodes, self.attributes) == (other.nodes, other.attributes)
        )


_interned: "weakref.WeakValueDictionary[Any, Any]" = weakref.WeakValueDictionary()
