"""Text from token ids as they are drawn, and stop strings in it."""

import functools
import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from megalodon_jax.data.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
# A character of UTF-8 has up to four bytes: up to three may await the rest of it.
_MAX_INCOMPLETE = 3
# Tokens before a cut, so that the decoder sees the end of the text before it.
_CONTEXT_TOKENS = 4
_MAX_WINDOW = 64
_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class TextStream:
    """The text of a growing sequence of token ids.

    The texts of all `feed` calls and of `close`, joined, are `tokenizer.decode` of all ids. Text is
    held back while a later token can still change it: bytes that may begin a character, and a run
    of byte tokens in a tokenizer that decodes such runs as a whole. Only a window of recent tokens
    is decoded again, so that the cost is linear in the number of tokens.
    """

    def __init__(self, tokenizer: "Tokenizer"):
        self._tokenizer = tokenizer
        content = tokenizer.files().get("tokenizer.json", b"")
        self._byte_ids, skipped = _byte_fallback_ids(content)
        self._skipped = skipped | {tokenizer.bos_id, tokenizer.eos_id}
        # Decoders treat the start of a text in their own way, for example drop its first space.
        # Later windows begin with these tokens instead.
        self._anchor = tokenizer.encode("a").tolist()
        self._window: list[int] = []
        self._num_context = 0
        self._emitted = ""
        self._is_start = True

    def feed(self, ids: Iterable[int]) -> str:
        """The text that these ids complete."""
        new = [int(token) for token in ids if token not in self._skipped]
        self._window += new
        if not new or new[-1] in self._byte_ids:
            return ""
        text = self._tokenizer.decode(self._window)
        stable = text
        for _ in range(_MAX_INCOMPLETE):
            stable = stable.removesuffix(_REPLACEMENT)
        delta = self._emit(stable)
        if text and stable == text == self._emitted:
            self._cut(len(self._window))
        elif len(self._window) > self._num_context + _MAX_WINDOW:
            self._cut_before_incomplete()
        return delta

    def close(self) -> str:
        """The text that was held back."""
        return self._emit(self._tokenizer.decode(self._window))

    def _emit(self, text: str) -> str:
        if not text.startswith(self._emitted):
            return ""
        delta = text[len(self._emitted) :]
        self._emitted = text if delta else self._emitted
        return delta

    def _cut(self, position: int) -> None:
        """Starts a new window with the context of a position, behind which text is as before."""
        context = self._context(position)
        self._window = context + self._window[position:]
        self._num_context = len(context)
        self._emitted = self._tokenizer.decode(context)
        self._is_start = False

    def _context(self, position: int) -> list[int]:
        first = 0 if self._is_start else len(self._anchor)
        return self._anchor + self._window[max(first, position - _CONTEXT_TOKENS) : position]

    def _cut_before_incomplete(self) -> None:
        """Cuts a window whose end is never complete, such as a run of invalid bytes.

        Both sides of a character's border decode to the whole; the right side has four tokens and
        more, so that a character across the border would have been completed by it.
        """
        decode = self._tokenizer.decode
        text = decode(self._window)
        size = len(self._window)
        for position in range(size - _CONTEXT_TOKENS, size - 3 * _CONTEXT_TOKENS, -1):
            left, context = decode(self._window[:position]), self._context(position)
            before = decode(context)
            joined = decode(context + self._window[position:])
            if joined.startswith(before) and left + joined[len(before) :] == text:
                emitted = self._emitted
                if not emitted.startswith(left):
                    continue
                self._cut(position)
                self._emitted += emitted[len(left) :]
                return


# The file is an attribute of the tokenizer: hashed and parsed once, not per stream.
@functools.lru_cache(maxsize=4)
def _byte_fallback_ids(content: bytes) -> tuple[frozenset[int], frozenset[int]]:
    """Ids of byte tokens whose runs are decoded as a whole, and of tokens that do not end a run.

    The ByteFallback decoder of the `tokenizers` library replaces all bytes of a run that is not
    UTF-8. Other decoders replace only the invalid bytes. Special tokens are skipped before.
    """
    if b'"ByteFallback"' not in content:
        return frozenset(), frozenset()
    table = json.loads(content)
    vocabulary = table["model"]["vocab"]
    # Unigram models list pairs of a piece and its score, in the order of the ids.
    pieces = (
        vocabulary.items()
        if isinstance(vocabulary, dict)
        else ((piece, token) for token, (piece, _) in enumerate(vocabulary))
    )
    byte_ids = frozenset(token for piece, token in pieces if _BYTE_PIECE.fullmatch(piece))
    special = (token for token in table.get("added_tokens", ()) if token.get("special"))
    return byte_ids, frozenset(token["id"] for token in special)


class StopMatch(NamedTuple):
    """Text that is ready, and where a stop string ended it.

    Attributes:
      text: text before any stop string, without a part that may begin one.
      stop: the stop string that was found, or None.
      num_tokens: `feed` calls so far, one per token; with `stop`: up to and including the token
        that completed the stop string.
    """

    text: str
    stop: str | None
    num_tokens: int


class StopStrings:
    """Search for stop strings in a text that arrives token by token.

    The first stop string to be completed ends the text, of several that end at the same character
    the longest: the result does not depend on how tokens divide the text.
    """

    def __init__(self, stops: Sequence[str]):
        if wrong := [stop for stop in stops if not stop]:
            raise ValueError(f"stop strings have {wrong[0]!r}; use at least one character")
        self._stops = tuple(stops)
        self._held = ""
        self._num_tokens = 0
        self._found: str | None = None

    def feed(self, text: str) -> StopMatch:
        """Adds the text of one token (possibly empty).

        Raises:
          ValueError: a stop string was found before.
        """
        if self._found is not None:
            raise ValueError(f"the text ended at the stop string {self._found!r}; do not go on")
        self._num_tokens += 1
        text = self._held + text
        matches = [
            (start + len(stop), start, stop)
            for stop in self._stops
            if (start := text.find(stop)) >= 0
        ]
        if matches:
            _, start, self._found = min(matches)
            self._held = ""
            return StopMatch(text[:start], self._found, self._num_tokens)
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return StopMatch(text[: len(text) - held], None, self._num_tokens)

    def close(self) -> str:
        """The text that was held back, when the tokens end without a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that begin a stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
