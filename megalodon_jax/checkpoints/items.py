"""The parts of a checkpoint as Orbax has them: arrays under dotted names, and a reader of them."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


def reader(directory: Path) -> ocp.CheckpointManager:
    """Reads for this process alone: one that fails does not leave the others at a barrier."""
    index = jax.process_index()
    return ocp.CheckpointManager(
        directory,
        options=ocp.CheckpointManagerOptions(
            read_only=True,
            create=False,
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=index,
                active_processes={index},
                barrier_sync_key_prefix=f"reader_{index}",
            ),
        ),
    )


@contextmanager
def suppress_orphaned_read_errors() -> Iterator[None]:
    """Hides what Orbax leaves behind when one of many reads fails: the others end in a closed loop.

    They end some time later, or never begin, each with a traceback that says nothing of the
    checkpoint, so after a failure the filter stays. Anything else still reaches the hook that was
    there before.
    """
    before = sys.unraisablehook

    def report_others(unraisable: Any) -> None:
        error = unraisable.exc_value
        ended = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
        # A warning, which comes here where warnings are errors.
        never_began = isinstance(error, RuntimeWarning) and "was never awaited" in str(error)
        if not (ended or never_began):
            before(unraisable)

    sys.unraisablehook = report_others
    yield
    sys.unraisablehook = before


def _name(path: tuple[Any, ...]) -> str:
    parts = [jax.tree_util.keystr((key,), simple=True) for key in path]
    # The last part of a Flax variable's path is the variable's own array.
    return ".".join(parts[:-1] if parts[-1] == "value" else parts)


def by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a tree of arrays under their dotted names."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {_name(path): leaf for path, leaf in leaves}


def abstract_by_name(tree: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, types and places to restore to; where none is said, this process's first device."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or device)
        for name, leaf in by_name(tree).items()
    }


def from_names(abstract: Any, arrays: Mapping[str, Any]) -> Any:
    """The inverse of `by_name`, for a tree of the structure of `abstract`."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(abstract)
    return jax.tree.unflatten(treedef, [arrays[_name(path)] for path, _ in paths])


def reason(error: Exception) -> str:
    """An error in one line of at most some 300 characters."""
    text = " ".join(str(error).split())
    # The system's own words (no space left, permission denied) stand at the end of a long chain.
    shortened = text if len(text) <= 300 else f"{text[:100]} ... {text[-180:]}"
    return f"{type(error).__name__}: {shortened}"
