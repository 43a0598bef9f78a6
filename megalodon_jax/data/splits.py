"""Training and held-out documents of a source, which never overlap.

Without held-out files (or a TFDS split), a document is held out if the hash of its name is below
`heldout_fraction`. If that leaves a split without documents (for example with a single file), the
last `heldout_fraction` of every document's bytes is held out instead.
"""

import hashlib
from typing import Literal

import numpy as np
from jaxtyping import Int64

from megalodon_jax.data.contents import Content, SliceContent
from megalodon_jax.data.sources import Source, digest_of
from megalodon_jax.data.text_files import Blocks
from megalodon_jax.errors import DataError

Split = Literal["train", "heldout"]
_REMEMBERED_BORDERS = 1024


class _Selection(Source):
    """A subset of another source's documents."""

    def __init__(self, whole: Source, indices: Int64[np.ndarray, " n"]):
        self._whole = whole
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def name(self, index: int) -> str:
        return self._whole.name(int(self._indices[index]))

    def open(self, index: int) -> Content:
        return self._whole.open(int(self._indices[index]))

    def where(self, index: int) -> str:
        return self._whole.where(int(self._indices[index]))

    def blocks(self) -> Blocks | None:
        if (blocks := self._whole.blocks()) is None:
            return None
        stops = np.searchsorted(self._indices, blocks.stops)
        # Blocks without a selected document go.
        kept = np.diff(stops, prepend=0) > 0
        return Blocks(stops[kept], np.unique(blocks.groups[kept], return_inverse=True)[1])

    def fingerprint(self) -> str:
        return digest_of(self._whole.fingerprint(), self._indices.tolist())


class _TextSlice(Source):
    """The last `fraction` of every document's bytes (held out), or the rest (training)."""

    def __init__(self, whole: Source, fraction: float, split: Split):
        self._whole = whole
        self._fraction = fraction
        self._split = split
        # A compressed document is decompressed to find its end.
        self._borders: dict[int, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._whole)

    def name(self, index: int) -> str:
        return f"{self._whole.name(index)} ({'start' if self._split == 'train' else 'end'})"

    def open(self, index: int) -> Content:
        content = self._whole.open(index)
        if (border := self._borders.get(index)) is None:
            border = _find_border(content, self._fraction)
            if len(self._borders) < _REMEMBERED_BORDERS:
                self._borders[index] = border
        cut, stop = border
        return SliceContent(content, *((0, cut) if self._split == "train" else (cut, stop)))

    def where(self, index: int) -> str:
        return self._whole.where(index)

    def blocks(self) -> Blocks | None:
        return self._whole.blocks()

    def fingerprint(self) -> str:
        return digest_of(self._whole.fingerprint(), self._fraction, self._split, "bytes")


def cuts_documents(source: Source) -> bool:
    """Whether a split has parts of documents, because there are too few whole ones."""
    return isinstance(source, _TextSlice)


def select_split(whole: Source, fraction: float, split: Split) -> Source:
    """The documents of one split.

    Args:
      whole: the documents of both.
      fraction: fraction of the documents, or of each one's bytes, that is held out.
      split: `"train"` or `"heldout"`.

    Raises:
      DataError: the held-out split is asked for, but nothing is held out.
    """
    if fraction == 0.0:
        if split == "heldout":
            raise DataError(
                "nothing is held out: data.heldout_fraction is 0; raise it, or name "
                "data.heldout_files"
            )
        return whole
    heldout = (is_held_out(name, fraction) for name in whole.names())
    heldout = np.fromiter(heldout, bool, len(whole))
    if heldout.all() or not heldout.any():
        return _TextSlice(whole, fraction, split)
    return _Selection(whole, np.flatnonzero(heldout == (split == "heldout")))


def _find_border(content: Content, fraction: float) -> tuple[int, int]:
    """The byte at which the last `fraction` of a document starts, and its number of bytes."""
    size = content.num_bytes()
    cut = size - min(max(1, round(size * fraction)), max(0, size - 1))
    # Not inside a character: back to its start, or past the first one.
    before = max(0, cut - 3)
    around = content.read(before, cut - before + 4)
    starts = [before + i for i, byte in enumerate(around) if byte & 0xC0 != 0x80]
    back = [start for start in starts if 0 < start <= cut]
    return (back or [start for start in starts if start > cut] or [size])[-1 if back else 0], size


def is_held_out(name: str, fraction: float) -> bool:
    """Whether a document is held out, by the hash of its name."""
    # Python's built-in hash differs between processes.
    digest = hashlib.blake2b(name.encode("utf-8", errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2.0**64 < fraction
