"""Cache of prompts' states at chunk borders, where keys and values are dead.

Attention never crosses a chunk: the state after a whole number of chunks is that of the norms and
of CEMA alone, 1.6 MB for mega200M whatever the length of the prompt.
"""

import collections
import dataclasses
import hashlib
from typing import NamedTuple

import jax
import numpy as np

from megalodon_jax.cache import Cache
from megalodon_jax.inference.requests import Request
from megalodon_jax.inference.rows import take_row


class _Entry(NamedTuple):
    cache: Cache
    num_bytes: int


class PrefixCache:
    """The least recently used states of prompts' beginnings, up to a number of bytes.

    Args:
      max_bytes: of all states together, on the device.
      chunk_size: tokens C of a chunk.
    """

    def __init__(self, max_bytes: int, chunk_size: int):
        self.max_bytes, self.num_bytes = max_bytes, 0
        self.chunk_size = chunk_size
        self._entries: collections.OrderedDict[bytes, _Entry] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, tokens: np.ndarray, cache: Cache, row: int = 0) -> None:
        """Keeps a row's state after `tokens` from a document's start, if they are whole chunks.

        Args:
          tokens: int32 (n,).
          cache: the cache; copied, without its keys and values.
          row: index of the row.
        """
        if not len(tokens) or len(tokens) % self.chunk_size:
            return
        key = _digests(tokens, self.chunk_size)[-1]
        if key in self._entries:
            self._entries.move_to_end(key)
            return
        kept = _take(_without_slots(cache), row)
        num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(kept))
        if num_bytes > self.max_bytes:
            return
        self._entries[key] = _Entry(kept, num_bytes)
        self.num_bytes += num_bytes
        while self.num_bytes > self.max_bytes:
            _, dropped = self._entries.popitem(last=False)
            self.num_bytes -= dropped.num_bytes

    def get(self, tokens: np.ndarray, empty: Cache) -> tuple[int, Cache]:
        """The longest known beginning of a prompt, its last token excluded.

        Args:
          tokens: int32 (n,), from a document's start.
          empty: one row before its first token.

        Returns:
          The number of tokens, a multiple of C, and the state after them (`empty` for 0).
        """
        count, states = self.states(tokens)
        return (0, empty) if states is None else (count, _with_slots_of(_take(states, 0), empty))

    def states(self, tokens: np.ndarray) -> tuple[int, Cache | None]:
        """As `get`, but the kept state itself, without keys and values; not to be donated."""
        key, count = self._find(tokens)
        if key is None:
            return 0, None
        self._entries.move_to_end(key)
        return count, self._entries[key].cache

    def longest(self, tokens: np.ndarray) -> int:
        """Tokens of the longest known beginning of a prompt."""
        return self._find(tokens)[1]

    def _find(self, tokens: np.ndarray) -> tuple[bytes | None, int]:
        # The scores of the next token need the prompt's last token.
        digests = _digests(tokens[:-1], self.chunk_size)
        for count in range(len(digests), 0, -1):
            if digests[count - 1] in self._entries:
                return digests[count - 1], count * self.chunk_size
        return None, 0

    def warm_up(self, cache: Cache) -> Cache:
        """Compiles what `put` and `get` run; returns the row as it would be kept."""
        return _take(_without_slots(cache), 0)


def reads_prefixes(request: Request) -> bool:
    """Whether a request may start from a known beginning of its prompt.

    A session has a state of its own, and log-probabilities need all of the prompt's tokens.
    """
    return request.session is None and request.prompt_logprobs is None


def _digests(tokens: np.ndarray, chunk_size: int) -> list[bytes]:
    """Digest of the tokens up to every chunk border."""
    digests, hasher = [], hashlib.sha256()
    for start in range(0, len(tokens) - chunk_size + 1, chunk_size):
        hasher.update(np.ascontiguousarray(tokens[start : start + chunk_size], "<i4").tobytes())
        digests.append(hasher.digest())
    return digests


def _without_slots(cache: Cache) -> Cache:
    layers = tuple(layer._replace(keys_and_values=None) for layer in cache.layers)
    return dataclasses.replace(cache, layers=layers)


def _with_slots_of(cache: Cache, other: Cache) -> Cache:
    layers = tuple(
        layer._replace(keys_and_values=theirs.keys_and_values)
        for layer, theirs in zip(cache.layers, other.layers, strict=True)
    )
    return dataclasses.replace(cache, layers=layers)


@jax.jit
def _take(cache: Cache, row: int) -> Cache:
    """New buffers: those of the argument may be donated to the next piece."""
    return jax.tree.map(lambda leaf: leaf.copy(), take_row(cache, row))
