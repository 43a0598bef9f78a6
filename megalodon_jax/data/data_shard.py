"""One data shard of a loader: its readers take turns, a batch each."""

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from megalodon_jax.data.packing import Counts
from megalodon_jax.typing import Batch

if TYPE_CHECKING:
    import grain

    from megalodon_jax.data.packing import PackedRows

POSITION_KEYS = frozenset({"readers", "next", "counts"})


class OpenReaderOfShard(Protocol):
    """Opens one reader of the shard."""

    def __call__(
        self, *, reader: int, num_readers: int, state: str | None
    ) -> "grain.IterDataset[PackedRows]":
        """The reader's batches after a position; None: from the first."""
        ...


class DataShard:
    """The batches of one data shard, and the position after the last one that was taken.

    Args:
      open_reader: opens one reader.
      num_readers: number of readers.
      num_sources: number of sources, for the counts.
      position: from `position`; None: at the first batch.
    """

    def __init__(
        self,
        open_reader: OpenReaderOfShard,
        *,
        num_readers: int,
        num_sources: int,
        position: dict[str, Any] | None,
    ):
        self._open_reader = open_reader
        self._num_readers = num_readers
        self._num_sources = num_sources
        self._readers: list[grain.DatasetIterator[PackedRows]] = []
        self._move_to(position)

    def _move_to(self, position: dict[str, Any] | None) -> None:
        self.close()
        self._states: list[str | None] = [None] * self._num_readers
        self._next = 0
        self.counts = np.zeros((self._num_sources, len(Counts._fields)), np.int64)
        if position is not None:
            self._states = list(position["readers"])
            self._next = position["next"]
            # Earlier versions counted less.
            saved = np.asarray(position["counts"], np.int64)
            self.counts[:, : saved.shape[1]] = saved
        self._readers = [
            iter(self._open_reader(reader=number, num_readers=self._num_readers, state=state))
            for number, state in enumerate(self._states)
        ]

    def __next__(self) -> "PackedRows":
        packed = next(self._readers[self._next])
        self._states[self._next] = packed.state
        self._next = (self._next + 1) % self._num_readers
        self.counts = self.counts + packed.counts
        # A batch of a worker that outlives it keeps shared memory open, which Python reports as
        # leaked.
        batch = Batch(*(np.array(a) if type(a) is not np.ndarray else a for a in packed.batch))  # type: ignore[arg-type]
        return packed._replace(batch=batch)

    def position(self) -> dict[str, Any]:
        """The position as JSON values."""
        return {"readers": self._states, "next": self._next, "counts": self.counts.tolist()}

    def rewind(self) -> None:
        """Restarts at the first batch."""
        self._move_to(None)

    def close(self) -> None:
        """Stops the readers."""
        while self._readers:
            self._readers.pop().close()
