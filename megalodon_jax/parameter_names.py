"""Dotted names of parameters, such as `layers.mega.wz.kernel`, and patterns that select them."""

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import jax

from megalodon_jax.errors import ConfigError


def name_of(path: tuple[Any, ...]) -> str:
    """The dotted name of a leaf, from its path in a tree."""
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    # The path of a Flax variable's array ends in "value".
    return ".".join(names[:-1] if names[-1:] == ["value"] else names)


def by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a tree of arrays by their dotted names."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {name_of(path): leaf for path, leaf in leaves}


def map_names[T](function: Callable[[str], Any], tree: T) -> T:
    """A tree of the same structure whose leaves are `function` of their dotted names."""
    return jax.tree_util.tree_map_with_path(lambda path, _: function(name_of(path)), tree)


def is_selected(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns matches the whole name; `*` matches dots too."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def map_selected[T](function: Callable[[Any], Any], tree: T, patterns: Sequence[str]) -> T:
    """A tree in which `function` has replaced the leaves whose names match one of the patterns."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(leaf) if is_selected(name_of(path), patterns) else leaf, tree
    )


def check_patterns(tree: Any, patterns: Sequence[str], *, setting: str) -> None:
    """Raises `ConfigError` if a pattern of a setting matches no parameter."""
    names = list(by_name(tree)) if patterns else []
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(
                f"{setting} has {pattern!r}, which matches no parameter; the parameters are "
                f"{', '.join(names)}"
            )
