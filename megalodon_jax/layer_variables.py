"""Variables of stacked blocks: slices of one layer, and what a layer's call adds or changes.

Flax libraries work on the modules that run: LoRA and quantization (Qwix) create Variables inside a
layer's call, and random streams count their draws. Such changes return from the loop over layers,
stacked as the parameters are.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from flax import nnx

from megalodon_jax.typing import Array, Int32

_AXIS = "layers"


class StackedBlocks(NamedTuple):
    """The parts of a module made by `stack_blocks`.

    Attributes:
      graphdef: the static structure.
      params: Variables with a leading axis of layers.
      random: random streams, one for all layers: keys and counts.
    """

    graphdef: nnx.GraphDef
    params: nnx.State
    random: nnx.State

    @property
    def has_random(self) -> bool:
        """Whether a layer needs its number, from which its random streams follow."""
        return bool(jax.tree.leaves(self.random))


class LayerChanges:
    """The Variables that the calls of the layers added or replaced, by module and attribute.

    `find` runs inside the loop over layers and `write` after it.
    """

    def __init__(self):
        self._keys: list[tuple[tuple[Any, ...], str]] = []

    def find(self, block: nnx.Module, before: dict[Any, list[Any]]) -> tuple[Any, ...]:
        """The new values; `before` is `snapshot` of the block before its call."""
        after = _attributes(block)
        self._keys = [key for key in after if not _is_same(before.get(key, []), after[key])]
        return tuple(after[key] for key in self._keys)

    def write(self, blocks: nnx.Module, stacked: tuple[Any, ...]) -> None:
        """Writes values with a leading axis of layers into the stacked blocks."""
        nodes = dict(_nodes(blocks))
        for (path, name), value in zip(self._keys, stacked, strict=True):
            existing = getattr(nodes[path], name, None)
            if isinstance(value, nnx.RngState):
                # A count is that after the last layer: all layers draw equally often.
                value = value.replace(value.get_value()[-1])
            if isinstance(existing, nnx.Variable) and type(existing) is type(value):
                existing.set_value(value.get_value())
            else:
                setattr(nodes[path], name, _map_variables(_add_axis, value))


def split_blocks(blocks: nnx.Module) -> StackedBlocks:
    """Splits stacked blocks for `merge_layer`."""
    graphdef, random, params = nnx.split(blocks, nnx.RngState, ...)
    return StackedBlocks(graphdef, params, random)


def merge_layer(blocks: StackedBlocks, params: nnx.State, number: Int32[Array, ""] | None) -> Any:
    """The block of one layer.

    Args:
      blocks: from `split_blocks`.
      params: `blocks.params` without the axis of layers.
      number: of the layer, if `has_random`: every layer draws other numbers.
    """
    random = blocks.random
    if number is not None:
        random = _map_variables(lambda variable: _fold_in(variable, number), random)
    return nnx.merge(blocks.graphdef, _map_variables(_remove_axis, params), random)


def snapshot(module: nnx.Module) -> dict[tuple[tuple[Any, ...], str], list[Any]]:
    """The arrays of the attributes that hold Variables, by path and name."""
    return {key: _arrays(value) for key, value in _attributes(module).items()}


def _attributes(module: nnx.Module) -> dict[tuple[tuple[Any, ...], str], Any]:
    return {
        (path, name): value
        for path, node in _nodes(module)
        for name, value in vars(node).items()
        if not isinstance(value, nnx.Pytree) and _arrays(value)
    }


def _nodes(module: nnx.Module) -> Iterator[tuple[tuple[Any, ...], Any]]:
    for path, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Module | nnx.RngStream):
            yield path, node


def _arrays(tree: Any) -> list[Any]:
    leaves = jax.tree.leaves(tree, is_leaf=_is_variable)
    return [leaf.get_raw_value() for leaf in leaves if _is_variable(leaf)]


def _is_variable(value: Any) -> bool:
    return isinstance(value, nnx.Variable)


def _is_same(before: list[Any], after: Any) -> bool:
    arrays = _arrays(after)
    return len(before) == len(arrays) and all(a is b for a, b in zip(before, arrays, strict=True))


def _map_variables(function: Any, tree: Any) -> Any:
    return jax.tree.map(
        lambda leaf: function(leaf) if _is_variable(leaf) else leaf, tree, is_leaf=_is_variable
    )


def _remove_axis(variable: nnx.Variable) -> nnx.Variable:
    names = variable.get_metadata().get("out_sharding")
    if not names or names[0] != _AXIS:
        return variable
    return _with_names(variable, tuple(names[1:]))


def _add_axis(variable: nnx.Variable) -> nnx.Variable:
    names = variable.get_metadata().get("out_sharding")
    return variable if names is None else _with_names(variable, (_AXIS, *names))


def _with_names(variable: nnx.Variable, names: tuple[str | None, ...]) -> nnx.Variable:
    variable = variable.copy()
    variable.set_metadata(out_sharding=names)
    return variable


def _fold_in(variable: nnx.Variable, number: Array) -> nnx.Variable:
    if not isinstance(variable, nnx.RngKey):
        return variable.copy()  # of this trace, in which a draw counts
    return variable.replace(jax.random.fold_in(variable.get_value(), number))
