"""Pieces of a document that are tokenized one after another, with the ids of the whole."""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np

from megalodon_jax.data.contents import Content
from megalodon_jax.errors import DataError

# Bytes of text per call of the tokenizer: a document that is not longer is encoded whole.
PIECE_BYTES = 1 << 17
# Places that are examined from the end of a piece before a longer one is read.
MAX_CANDIDATES = 64
# Characters on both sides of a cut whose encoding must stay the same.
CONTEXT_CHARS = 128
_BETWEEN_WORDS = re.compile(r"(?<=\S)[ \n](?=\S)")


class TextCut(NamedTuple):
    """A place where a text can be cut: encoding both sides gives the ids of the whole.

    Attributes:
      left: characters before the cut.
      right: first character after it: `left`, or `left + 1` where the tokenizer puts back the space
        between them itself.
    """

    left: int
    right: int


class CuttableTokenizer(Protocol):
    """The part of a tokenizer that cutting needs."""

    def find_cut(self, text: str) -> TextCut | None:
        """The last safe cut of a text that goes on after its end; None if there is none."""
        ...


class TextPiece(NamedTuple):
    """A piece of a document.

    Attributes:
      text: its characters.
      start: byte of the document at which it starts.
      stop: byte at which the next piece starts.
      is_last: whether the document ends with it.
    """

    text: str
    start: int
    stop: int
    is_last: bool


def read_piece(
    content: Content, start: int, tokenizer: CuttableTokenizer, *, size: int | None = None
) -> TextPiece:
    """Reads the piece that starts at a byte.

    The pieces of a document depend on its bytes and the tokenizer only. A piece is longer than
    `size` bytes only if the tokenizer finds no safe cut in so many.

    Args:
      content: the document.
      start: 0, or `stop` of the piece before.
      tokenizer: says where a text can be cut.
      size: most bytes of a piece; None: `PIECE_BYTES`.

    Raises:
      DataError: the document cannot be read or is not UTF-8.
    """
    size = PIECE_BYTES if size is None else size
    while True:
        # Four more bytes complete the last character and show whether the document goes on.
        raw = content.read(start, size + 4)
        if len(raw) <= size:
            return TextPiece(decode_utf8(raw, start), start, start + len(raw), True)
        text = decode_utf8(raw[: last_border(raw, size)], start)
        if (cut := tokenizer.find_cut(text)) is not None:
            stop = start + len(text[: cut.right].encode("utf-8"))
            return TextPiece(text[: cut.left], start, stop, False)
        size *= 2


def last_border(content: bytes, size: int) -> int:
    """The last border of characters at or before byte `size` of UTF-8 text that goes on there."""
    for border in range(size, max(0, size - 4), -1):
        if content[border] & 0xC0 != 0x80:
            return border
    # Not UTF-8; decoding names the byte.
    return size


def decode_utf8(content: bytes, start: int = 0) -> str:
    """Decodes text.

    Args:
      content: bytes from `start` on.
      start: byte of the document at which they start, for the message.

    Raises:
      DataError: it is not UTF-8; the message names the first bad byte.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8 text (byte {start + error.start} is 0x{content[error.start]:02x}); "
            "convert the file or leave it out"
        ) from error


def find_checked_cut(
    text: str,
    *,
    drops_space: bool,
    encode: Callable[[str], np.ndarray],
    is_border: Callable[[str, int], bool],
) -> TextCut | None:
    """The last cut between two words at which the encoding of the text around it stays the same.

    Args:
      text: the text, which goes on after its end.
      drops_space: whether the tokenizer puts a space before every text, so that the one at the cut
        is left out.
      encode: ids of a text.
      is_border: whether the tokenizer never joins both sides of a character of a text.
    """
    for candidate in _last_between_words(text):
        first = max(0, candidate - CONTEXT_CHARS)
        context = text[first : candidate + CONTEXT_CHARS]
        left, right = candidate - first, candidate - first + drops_space
        if drops_space and context[left] != " ":
            continue
        if not is_border(context, left):
            continue
        halves = np.concatenate([encode(context[:left]), encode(context[right:])])
        if np.array_equal(halves, encode(context)):
            return TextCut(candidate, candidate + drops_space)
    return None


def _last_between_words(text: str) -> Iterator[int]:
    """The last places with a single space or line break between other characters, last first."""
    # The text after a cut must be long enough to show that the encoding stays the same.
    stop = len(text) - CONTEXT_CHARS
    width = 64 * MAX_CANDIDATES
    found = 0
    while stop > 1 and found < MAX_CANDIDATES:
        start = max(0, stop - width)
        places = [match.start() for match in _BETWEEN_WORDS.finditer(text, start, stop)]
        for place in reversed(places):
            yield place
            found += 1
            if found == MAX_CANDIDATES:
                return
        stop = start
