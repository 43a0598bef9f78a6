"""Checkpoint items as Orbax stores them: arrays under dotted names."""

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import orbax.checkpoint as ocp

from megalodon_jax.parameter_names import by_name, name_of


def reader() -> ocp.Checkpointer:
    """Orbax's reader of one checkpoint, in this process only.

    A process that fails to read does not leave the others waiting at a barrier. Orbax's manager of
    checkpoints is for runs that save: opened to read only, it warns of each of its settings for
    saving and looks for metrics that these checkpoints do not have.
    """
    index = jax.process_index()
    return ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(),
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            primary_host=index,
            active_processes={index},
            barrier_sync_key_prefix=f"reader_{index}",
        ),
    )


def filter_orphaned_errors() -> Callable[[], None]:
    """Drops the errors of Orbax's remaining concurrent reads or writes after one has failed.

    They fail later in a closed event loop, with tracebacks that do not mention the checkpoint.
    Other errors reach the previous hook.

    Returns:
      A function that removes the filter.
    """
    before = sys.unraisablehook

    def report_unrelated(unraisable: Any) -> None:
        error = unraisable.exc_value
        loop_closed = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
        # A warning arrives here if warnings are errors.
        never_awaited = isinstance(error, RuntimeWarning) and "was never awaited" in str(error)
        if not (loop_closed or never_awaited):
            before(unraisable)

    def is_unrelated(record: logging.LogRecord) -> bool:
        return "exception was never retrieved" not in record.getMessage()

    def remove() -> None:
        sys.unraisablehook = before
        logging.getLogger("asyncio").removeFilter(is_unrelated)

    sys.unraisablehook = report_unrelated
    logging.getLogger("asyncio").addFilter(is_unrelated)
    return remove


@contextmanager
def suppress_orphaned_read_errors() -> Iterator[None]:
    """Filters orphaned errors during a read, and from then on if it fails."""
    remove = filter_orphaned_errors()
    yield
    remove()


def abstract_by_name(tree: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings to restore to; the default is this process's first device."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or device)
        for name, leaf in by_name(tree).items()
    }


def from_names(abstract: Any, arrays: Mapping[str, Any]) -> Any:
    """The inverse of `by_name`, for a tree of the structure of `abstract`."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(abstract)
    return jax.tree.unflatten(treedef, [arrays[name_of(path)] for path, _ in paths])


def reason(error: Exception) -> str:
    """An error as one line of about 300 characters at most."""
    text = " ".join(str(error).split())
    # The operating system's message (no space left, permission denied) is at the end of the chain.
    shortened = text if len(text) <= 300 else f"{text[:100]} ... {text[-180:]}"
    return f"{type(error).__name__}: {shortened}"
