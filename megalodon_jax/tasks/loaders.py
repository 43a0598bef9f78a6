"""The loaders that a run needs, and loaders of your own batches."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from megalodon_jax.config import TrainConfig
from megalodon_jax.errors import ConfigError, DataError
from megalodon_jax.typing import Batch, CountedBatch


class TrainingLoader(Protocol):
    """An endless iterator over this process's rows of the batches, whose position is saved."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def state_dict(self) -> dict[str, Any]:
        """The position as JSON values, which `megalodon_jax.data.merge_states` merges."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues at a saved position."""
        ...

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the sources that `counts` counts."""
        ...

    def counts(self) -> dict[str, list[list[int]]]:
        """Counts of what was read, by data shard and source; empty: nothing is counted."""
        ...

    def close(self) -> None:
        """Ends threads and processes."""
        ...


class HeldoutLoader(Protocol):
    """A single pass over held-out data that can be repeated."""

    def rewind(self) -> None:
        """Restarts at the first batch."""
        ...

    def with_bytes(self) -> Iterator[CountedBatch]:
        """The batches of the pass."""
        ...


class OwnBatches:
    """A `TrainingLoader` of batches from any iterator.

    An iterator with `state_dict` and `load_state_dict` (JSON values) is resumed by them. Any other
    one must give the same batches in every start of the run: it is resumed by reading and dropping
    the batches of the earlier steps.

    Args:
      batches: endless; rows of this process only, numpy arrays (rows, seq_len) as in `Batch`.
      rows: rows of this process.
      seq_len: tokens of a row.
    """

    source_names: tuple[str, ...] = ()

    def __init__(self, batches: Iterable[Batch], *, rows: int, seq_len: int) -> None:
        self._source = batches
        self._batches = iter(batches)
        self._shape = (rows, seq_len)
        self._count = 0

    def __iter__(self) -> "OwnBatches":
        return self

    def __next__(self) -> Batch:
        try:
            batch = next(self._batches)
        except StopIteration:
            raise DataError(
                f"the batches ended after {self._count}; give an endless iterator, or lower `steps`"
            ) from None
        checked = checked_batch(batch, self._shape, f"batch {self._count}")
        self._count += 1
        return checked

    def state_dict(self) -> dict[str, Any]:
        """The number of batches, and the iterator's own state if it has one."""
        own = self._source.state_dict() if self._has_state() else None  # type: ignore[attr-defined]
        return {
            "settings": {"num_shards": jax.process_count(), "seq_len": self._shape[1]},
            "shards": {str(jax.process_index()): {"batches": self._count, "state": own}},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues after the batches of a saved state.

        Raises:
          DataError: the state is of another kind of loader or of other processes, or the batches
            end before it.
        """
        saved = state.get("shards", {}).get(str(jax.process_index()))
        if not isinstance(saved, Mapping) or saved.keys() != {"batches", "state"}:
            raise DataError(
                "the checkpoint was saved with another loader; resume with the same, or start a "
                "new run from these weights with init_from"
            )
        if state["settings"].get("num_shards") != jax.process_count():
            raise DataError(
                f"the checkpoint was saved by {state['settings'].get('num_shards')} processes, "
                f"each with its own batches, and there are {jax.process_count()}; use as many"
            )
        if (saved["state"] is not None) != self._has_state():
            raise DataError(
                "the batches had a state_dict when the checkpoint was saved or have one now, but "
                "not both; resume with the same iterator"
            )
        if saved["state"] is not None:
            self._source.load_state_dict(saved["state"])  # type: ignore[attr-defined]
            self._batches = iter(self._source)
            self._count = saved["batches"]
        else:
            while self._count < saved["batches"]:
                next(self)

    def counts(self) -> dict[str, list[list[int]]]:
        """Empty: documents and tokens of sources are not known."""
        return {}

    def close(self) -> None:
        """Calls the iterator's own `close` if it has one."""
        if callable(close := getattr(self._source, "close", None)):
            close()

    def _has_state(self) -> bool:
        return hasattr(self._source, "state_dict") and hasattr(self._source, "load_state_dict")


class OwnHeldout:
    """A `HeldoutLoader` of batches from a function.

    Args:
      make_batches: starts a pass over instances of `Batch` or `CountedBatch` with this process's
        rows.
      rows: rows of this process.
      seq_len: tokens of a row.
    """

    def __init__(
        self, make_batches: Callable[[], Iterable[Batch | CountedBatch]], *, rows: int,
        seq_len: int,
    ) -> None:  # fmt: skip
        self._make_batches = make_batches
        self._shape = (rows, seq_len)

    def rewind(self) -> None:
        """Does nothing: every pass starts anew."""

    def with_bytes(self) -> Iterator[CountedBatch]:
        """A pass; a plain batch has no bytes, and then bits per byte are NaN."""
        for i, entry in enumerate(self._make_batches()):
            counted = entry if isinstance(entry, CountedBatch) else CountedBatch(entry, None)
            batch = checked_batch(counted.batch, self._shape, f"held-out batch {i}")
            yield counted._replace(batch=batch)


def own_loaders(
    config: TrainConfig,
    batches: Iterable[Batch] | None,
    heldout: Mapping[str, Callable[[], Iterable[Batch | CountedBatch]]] | None,
    *,
    rows: int,
) -> tuple[OwnBatches, dict[str, OwnHeldout]]:
    """The loaders of a run whose batches the caller gives.

    Args:
      config: the run.
      batches: for `OwnBatches`.
      heldout: functions for `OwnHeldout`, by the name of the held-out set.
      rows: rows of this process.

    Raises:
      ConfigError: there are held-out sets without training batches.
    """
    if batches is None:
        raise ConfigError(
            "held-out batches were given without training batches; give `loader` too, or name the "
            "held-out files in data.heldout_files"
        )
    seq_len = config.data.seq_len
    return OwnBatches(batches, rows=rows, seq_len=seq_len), {
        name: OwnHeldout(make, rows=rows, seq_len=seq_len) for name, make in (heldout or {}).items()
    }


def checked_batch(batch: Any, shape: tuple[int, int], name: str) -> Batch:
    """The batch with its arrays in the dtypes of `Batch`.

    Raises:
      DataError: it is no batch, or its arrays have other shapes; both are named.
    """
    if not isinstance(batch, tuple) or len(batch) != len(Batch._fields):
        raise DataError(
            f"{name} is of type {type(batch).__name__}; give megalodon_jax.Batch(tokens, targets, "
            "segment_ids, weights)"
        )
    dtypes = (np.int32, np.int32, np.int32, np.float32)
    arrays = [np.asarray(array) for array in batch]
    for field, array, dtype in zip(Batch._fields, arrays, dtypes, strict=True):
        if array.shape != shape or not np.can_cast(array.dtype, dtype, "same_kind"):
            raise DataError(
                f"{field} of {name} has shape {array.shape} and dtype {array.dtype}; the run needs "
                f"{shape} (rows of this process, data.seq_len) and {np.dtype(dtype)}"
            )
    return Batch(*(a.astype(d, copy=False) for a, d in zip(arrays, dtypes, strict=True)))  # type: ignore[arg-type]
