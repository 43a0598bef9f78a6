"""The order in which documents are read: shuffled anew in every epoch, without a list of them."""

import functools
from typing import cast

import numpy as np
from jaxtyping import Int64

from megalodon_jax.data.text_files import Blocks


class ShuffledOrder:
    """The document of every step of reading; step i belongs to epoch i // num_documents."""

    def __init__(self, num_documents: int, seed: int):
        # A local import: this package imports without grain.
        import grain

        self._order = grain.MapDataset.range(num_documents).shuffle(seed=seed).repeat()

    def __getitem__(self, step: int) -> int:
        return int(cast(int, self._order[step]))


class BlockOrder:
    """An order in which the documents of a block follow each other, so that it is decoded once.

    Groups of blocks are shuffled, the blocks of a group keep their order, and the documents of a
    block are shuffled.
    """

    def __init__(self, blocks: Blocks, seed: int):
        self._stops, self._groups = blocks
        self._seed = seed
        # The current epoch and block, and their neighbors.
        self._blocks_of_epoch = functools.lru_cache(2)(self._shuffle_blocks)
        self._documents_of_block = functools.lru_cache(2)(self._shuffle_documents)

    def __getitem__(self, step: int) -> int:
        epoch, position = divmod(step, int(self._stops[-1]))
        blocks, stops = self._blocks_of_epoch(epoch)
        place = int(np.searchsorted(stops, position, side="right"))
        before = int(stops[place - 1]) if place else 0
        return int(self._documents_of_block(epoch, int(blocks[place]))[position - before])

    def _shuffle_blocks(
        self, epoch: int
    ) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """The blocks in the order of an epoch, and the step of the epoch after each of them."""
        first = np.flatnonzero(np.diff(self._groups, prepend=-1))
        last = np.append(first[1:], len(self._groups))
        order = np.random.default_rng((self._seed, epoch)).permutation(len(first))
        blocks = np.concatenate([np.arange(int(first[group]), int(last[group])) for group in order])
        return blocks, np.cumsum(np.diff(self._stops, prepend=0)[blocks])

    def _shuffle_documents(self, epoch: int, block: int) -> Int64[np.ndarray, " n"]:
        start = int(self._stops[block - 1]) if block else 0
        random = np.random.default_rng((self._seed, epoch, block))
        return start + random.permutation(int(self._stops[block]) - start)
