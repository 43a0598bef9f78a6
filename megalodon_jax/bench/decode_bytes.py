"""Bytes that one decoding step must read and write, from the sizes of the real arrays."""

from typing import Any, NamedTuple

import jax

from megalodon_jax.baselines.cache import TransformerCache
from megalodon_jax.inference.weights import DecodeWeights

_LOGIT_BYTES = 4


class StepBytes(NamedTuple):
    """Bytes of a step, each read once and written once.

    Attributes:
      weights: read, without the embedding, of which a step reads one row for each token.
      embedding: the rows of the embedding that are read.
      keys_and_values: of the filled slots; the new token's are written, the others read.
      states: CEMA's and the norms', read and written.
      logits: written, and read by the draw.
    """

    weights: int
    embedding: int
    keys_and_values: int
    states: int
    logits: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def step_bytes(weights: Any, cache: Any, *, rows: int, fill: float) -> StepBytes:
    """The fewest bytes of a step.

        bytes = W - V D w + B (D w + fill k + 2 s + 8 V)

    W is the size of all weights, w that of an element of the embedding (V, D), k the size of a
    token's keys and values in all layers, s that of a row's states. Activations are not counted.

    Args:
      weights: prepared weights of any kind, or their shapes.
      cache: the cache of any number of rows, or its shapes.
      rows: rows B that decode.
      fill: slots of a row that are filled after the step, see `mean_fill`.
    """
    num_outputs, table = _sizes(weights)
    state_bytes = row_bytes(cache) - cache_slots(cache) * token_bytes(cache)
    width = 0 if table is None else table.shape[1] * table.dtype.itemsize
    return StepBytes(
        weights=num_bytes(weights) - (0 if table is None else _size(table)),
        embedding=rows * width,
        keys_and_values=round(rows * fill * token_bytes(cache)),
        states=2 * rows * state_bytes,
        logits=2 * rows * _LOGIT_BYTES * num_outputs,
    )


def mean_fill(position: int, steps: int, slots: int) -> float:
    """Filled slots after a step, on average over some steps of a row.

    Args:
      position: tokens that the row has had before the first of these steps.
      steps: number of steps.
      slots: slots of a row; MEGALODON begins again at the first slot after each chunk.
    """
    return sum((position + step) % slots + 1 for step in range(steps)) / steps


def cache_slots(cache: Any) -> int:
    """Slots of a row."""
    return _keys_and_values(cache)[0].shape[2]


def token_bytes(cache: Any) -> int:
    """Bytes of a token's keys and values in all layers."""
    slots = _keys_and_values(cache)
    return sum(_size(leaf) // (leaf.shape[0] * leaf.shape[2]) for leaf in slots)


def row_bytes(cache: Any) -> int:
    """Bytes of a row of a cache; its position and segment, four bytes each, are not counted."""
    leaves = jax.tree.leaves(cache.layers) + jax.tree.leaves(getattr(cache, "final_norm", None))
    return sum(_size(leaf) // leaf.shape[0] for leaf in leaves)


def num_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, or of their shapes."""
    return sum(map(_size, jax.tree.leaves(tree)))


def _size(leaf: Any) -> int:
    return leaf.size * leaf.dtype.itemsize


def _keys_and_values(cache: Any) -> list[Any]:
    if isinstance(cache, TransformerCache):
        return jax.tree.leaves(cache.layers)
    return jax.tree.leaves([layer.keys_and_values for layer in cache.layers])


def _sizes(weights: Any) -> tuple[int, Any]:
    """Columns of the output matrix; the embedding if a step reads single rows of it.

    A tied embedding is also the output matrix, hence None.
    """
    if isinstance(weights, DecodeWeights):
        return weights.config.num_outputs, weights.embedding
    sizes = []

    def embedding(weights: Any) -> Any:
        model = weights.model()
        sizes.append(model.config.num_outputs)
        return None if model.output is None else model.embed.embedding[...]

    table = jax.eval_shape(embedding, weights)
    return sizes[0], table
