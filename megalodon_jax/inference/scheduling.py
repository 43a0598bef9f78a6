"""Decisions of an engine on the host: the queue, the rows that run, the length of a block."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable

from megalodon_jax.inference.sampling import MAX_LOGPROBS, Features

BLOCK_LENGTHS = (1, 8, 32)
"""Decoding steps of a block: the host reads tokens after a block, and rows enter before one."""

FEATURE_SETS = (
    Features(),
    Features(random=True, top_k=True, top_p=True, min_p=True),
    Features(
        random=True,
        top_k=True,
        top_p=True,
        min_p=True,
        penalties=True,
        bias=True,
        logprobs=MAX_LOGPROBS,
    ),
)
"""Compiled variants of a draw; a block takes the first one that covers all of its rows."""


class FairQueue[T]:
    """First in, first out for each client; clients take turns."""

    def __init__(self) -> None:
        self._by_client: collections.OrderedDict[str, collections.deque[T]] = (
            collections.OrderedDict()
        )

    def __len__(self) -> int:
        return sum(map(len, self._by_client.values()))

    def put(self, client: str, item: T) -> None:
        """Adds an item behind its client's others."""
        self._by_client.setdefault(client, collections.deque()).append(item)

    def peek(self) -> T:
        """The next item."""
        return next(iter(self._by_client.values()))[0]

    def get(self) -> T:
        """Removes the next item; its client's turn comes again after the others'."""
        client, items = next(iter(self._by_client.items()))
        item = items.popleft()
        del self._by_client[client]
        if items:
            self._by_client[client] = items
        return item

    def drop(self, is_dropped: Callable[[T], bool]) -> None:
        """Removes the items for which the function is true; the others keep their turns."""
        for client, items in list(self._by_client.items()):
            kept = collections.deque(item for item in items if not is_dropped(item))
            if kept:
                self._by_client[client] = kept
            else:
                del self._by_client[client]


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Numbers of rows that are compiled: 2, 8, 32, ..., and all slots."""

    sizes: tuple[int, ...]

    @classmethod
    def up_to(cls, slots: int) -> "Buckets":
        """Buckets of an engine with so many slots, at least 2.

        One row runs as two: XLA makes products with one row into sums that round otherwise.
        """
        sizes, size = [], 2
        while size < slots:
            sizes.append(size)
            size *= 4
        return cls((*sizes, slots))

    def of(self, rows: int) -> int:
        """The smallest bucket for so many rows."""
        return next(size for size in self.sizes if size >= rows)


def block_length(
    most_remaining: int,
    *,
    is_short: bool,
    is_filling: bool,
    is_constrained: bool,
    lengths: tuple[int, ...] = BLOCK_LENGTHS[1:],
) -> int:
    """Steps of the next block.

    Args:
      most_remaining: tokens that the longest running request may still draw.
      is_short: whether the host needs the tokens soon, for example because a request waits.
      is_filling: whether a request waits beside a free slot. One piece of a prompt runs between
        two blocks: longer blocks would leave slots empty.
      is_constrained: whether the host chooses the allowed tokens of a row.
      lengths: compiled lengths besides 1, the shortest first.
    """
    if is_constrained or is_filling:
        return BLOCK_LENGTHS[0]
    if is_short:
        return lengths[0]
    # The last block may have some steps too many: each length is another program to compile.
    return max((n for n in lengths if 4 * most_remaining >= 3 * n), default=lengths[0])


def covering(features: Iterable[Features]) -> Features:
    """The first of `FEATURE_SETS` that covers all of them."""
    return _covering(frozenset(features))


@functools.cache
def _covering(features: frozenset[Features]) -> Features:
    needed = Features()
    for each in features:
        needed = needed.union(each)
    return next(known for known in FEATURE_SETS if known.covers(needed))
