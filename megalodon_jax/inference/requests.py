"""Requests of an engine, and the streams of tokens that answer them."""

import bisect
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from megalodon_jax.errors import RequestError
from megalodon_jax.inference.sampling import Features, Logprobs, SamplingParams
from megalodon_jax.inference.text import StopStrings, TextStream
from megalodon_jax.typing import Int32

if TYPE_CHECKING:
    from megalodon_jax.data.tokenizer import Tokenizer
    from megalodon_jax.inference.sessions import Session

FinishReason = Literal["stop", "length", "cancelled", "invalid"]
"""Why a stream ended: a stop id or stop string; `max_tokens`; `Engine.cancel`; NaN scores."""

LogitsMask = Callable[[Sequence[int]], np.ndarray | None]
"""From the drawn tokens so far to a bit mask of the tokens allowed next, see `sampling.draw`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt, and how to continue it.

    Attributes:
      prompt: token ids, at least one; with a session, the tokens after its own.
      params: sampling, stops and the number of tokens.
      session: state of the tokens before the prompt.
      keep_session: whether `Stream.session` is there at the end.
      client: whose request it is: the queue takes turns between clients.
      prompt_logprobs: log-probabilities of the prompt's tokens and of the n most probable ones, 0
        to 20; None: not computed.
      logits_mask: hook for constrained decoding; the engine then reads every token before it draws
        the next one.
    """

    prompt: Sequence[int] | np.ndarray
    params: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    session: "Session | None" = None
    keep_session: bool = False
    client: str = ""
    prompt_logprobs: int | None = None
    logits_mask: LogitsMask | None = None

    @functools.cached_property
    def tokens(self) -> Int32[np.ndarray, " n"]:
        """The prompt of a valid request as an array."""
        return np.asarray(self.prompt, np.int32)

    @property
    def features(self) -> Features:
        """Features of the draw that it needs."""
        return Features.of(self.params)


def check_prompt(prompt: np.ndarray, vocab_size: int, *, may_be_empty: bool) -> None:
    """Raises RequestError for a prompt that is not a row of token ids."""
    if prompt.ndim != 1 or not (len(prompt) or may_be_empty):
        raise RequestError(
            f"the prompt has shape {prompt.shape}; pass at least one token id (an empty text "
            "begins with the tokenizer's bos_id)"
        )
    if len(prompt) and not np.issubdtype(prompt.dtype, np.integer):
        raise RequestError(f"the prompt is {prompt.dtype}; pass integer token ids")
    if len(prompt) and not 0 <= prompt.min() <= prompt.max() < vocab_size:
        raise RequestError(
            f"token ids run from {prompt.min()} to {prompt.max()}, but the model knows 0 to "
            f"{vocab_size - 1}"
        )


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Log-probability of a token under the model, and those of the most probable ones."""

    token: float
    top: tuple[tuple[int, float], ...]

    @classmethod
    def take(cls, logprobs: Logprobs, index: tuple[int, ...], count: int) -> "TokenLogprobs":
        """One entry of arrays on the host, with the `count` most probable tokens."""
        ids, top = logprobs.top_ids[index][:count], logprobs.top[index][:count]
        pairs = zip(ids.tolist(), top.tolist(), strict=True)
        return cls(float(logprobs.token[index]), tuple(pairs))


class Stream:
    """The tokens of one request, as they come.

    Iterating over it steps the engine until there are new tokens, and ends when the request has
    ended. `text` needs an engine with a tokenizer.

    Attributes:
      request: the request.
      tokens: the tokens so far, without the stop id or the tokens of a stop string.
      logprobs: of these tokens, if the request asked for them.
      prompt_logprobs: of the prompt's tokens, if the request asked for them; None for a token
        without one before it. There when the first token is.
      finish_reason: None while the request is running.
      stop_id: the stop id that ended it; None otherwise.
      session: the state after the tokens, if the request keeps it.
    """

    def __init__(
        self,
        request: Request,
        seed: int,
        step: Callable[[], None],
        tokenizer: "Tokenizer | None",
    ):
        self.request = request
        self.seed = seed
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs | None] = []
        self.finish_reason: FinishReason | None = None
        self.stop_id: int | None = None
        self.session: Session | None = None
        self._step = step
        self._num_read = 0
        self._text = None
        if tokenizer is not None:
            self._text = _AnswerText(tokenizer, request.params.stop, self.tokens)

    @property
    def text(self) -> str:
        """The text so far, without an incomplete character at its end or a stop string.

        Raises:
          ValueError: the engine has no tokenizer.
        """
        return "".join(self.text_pieces())

    @property
    def num_settled_tokens(self) -> int:
        """Tokens that stay in the answer, whatever follows.

        A stop string removes its own tokens, so that the newest ones may be removed until the text
        after them is known.
        """
        if self.is_finished or self._text is None or not self._text.has_stops:
            return len(self.tokens)
        return min(self._text.num_tokens, len(self.tokens))

    @property
    def is_finished(self) -> bool:
        """Whether the request has ended."""
        return self.finish_reason is not None

    def __iter__(self) -> Iterator[int]:
        while True:
            while self._num_read < len(self.tokens):
                self._num_read += 1
                yield self.tokens[self._num_read - 1]
            if self.is_finished:
                return
            self._step()

    def iterate_text(self) -> Iterator[str]:
        """New text as it comes; steps the engine like iterating over tokens."""
        num_read = 0
        while True:
            pieces = self.text_pieces()
            if num_read < len(pieces):
                new = "".join(pieces[num_read:])
                num_read = len(pieces)
                yield new
            elif self.is_finished:
                return
            else:
                self._step()

    def result(self) -> list[int]:
        """All tokens; steps the engine until the request has ended."""
        while not self.is_finished:
            self._step()
        return self.tokens

    def add(self, token: int, logprobs: TokenLogprobs | None, *, is_valid: bool) -> None:
        """Adds a drawn token, and ends the stream where it ends; the engine calls it."""
        params = self.request.params
        if not is_valid:
            self.finish("invalid")
            return
        if token in params.stop_ids:
            self.stop_id = token
            self.finish("stop")
            return
        self.tokens.append(token)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        if self._text is not None and self._text.has_stops:
            self._text.advance()
        if self._text is not None and self._text.is_stopped:
            self.finish("stop")
        elif len(self.tokens) == params.max_tokens:
            self.finish("length")

    def finish(self, reason: FinishReason) -> None:
        """Ends the stream; the engine calls it."""
        self.finish_reason = reason
        if self._text is None or not self._text.has_stops:
            return
        self._text.close()
        if self._text.is_stopped:
            # The tokens of the stop string are not part of the answer.
            kept = self._text.num_tokens
            del self.tokens[kept:], self.logprobs[kept:]
            self.finish_reason = "stop"

    def text_pieces(self) -> Sequence[str]:
        """The text so far, in the pieces in which it came; it only grows. Raises as `text`."""
        if self._text is None:
            raise ValueError("the engine has no tokenizer: pass Engine(..., tokenizer=)")
        if self.is_finished:
            self._text.close()
        else:
            self._text.advance()
        return self._text.pieces


def logits_masks(
    streams: Sequence[Stream | None], num_outputs: int
) -> Int32[np.ndarray, "B W"] | None:
    """Masks of the next draw, one row a stream, see `sampling.draw`; None without any."""
    masks = [
        None
        if stream is None or stream.request.logits_mask is None
        else stream.request.logits_mask(stream.tokens)
        for stream in streams
    ]
    if all(mask is None for mask in masks):
        return None
    allowed = np.full((len(streams), -(-num_outputs // 32)), -1, np.int32)
    for row, mask in zip(allowed, masks, strict=True):
        if mask is not None:
            row[: len(mask)] = mask
    return allowed


class _AnswerText:
    """The text of a stream up to a stop string.

    Tokens are decoded when the text is read, which is cheaper for many at a time; a search for stop
    strings needs the text of every token.

    Attributes:
      pieces: the text so far, in the pieces in which it came.
      has_stops: whether there are stop strings to search for.
      is_stopped: whether one of them has ended the text.
    """

    def __init__(self, tokenizer: "Tokenizer", stops: Sequence[str], tokens: list[int]):
        self.pieces: list[str] = []
        self.has_stops = bool(stops)
        self.is_stopped = False
        self._tokens = tokens
        self._num_decoded = 0
        self._is_closed = False
        self._stream = TextStream(tokenizer)
        self._stops = StopStrings(stops)
        self._length = 0
        # Characters of the text after every token, those that `StopStrings` holds back included.
        self._ends: list[int] = []
        self._num_characters = 0

    def advance(self) -> None:
        """Adds the text of new tokens."""
        if self._is_closed or self.is_stopped:
            return
        new = self._tokens[self._num_decoded :]
        self._num_decoded += len(new)
        if not self.has_stops:
            self._append(self._stream.feed(new))
            return
        for token in new:
            self._search(self._stream.feed([token]))
            self._ends.append(self._num_characters)
            if self.is_stopped:
                return

    def close(self) -> None:
        """Adds the text that was held back; the stream has ended."""
        self.advance()
        if not self._is_closed and not self.is_stopped:
            self._search(self._stream.close())
        if not self._is_closed and not self.is_stopped:
            self._append(self._stops.close())
        self._is_closed = True

    @property
    def num_tokens(self) -> int:
        """Tokens of the text before the stop string, one with parts of both included."""
        return bisect.bisect_left(self._ends, self._length) + 1 if self._length else 0

    def _search(self, text: str) -> None:
        self._num_characters += len(text)
        match = self._stops.feed(text)
        self._append(match.text)
        self.is_stopped = match.stop is not None

    def _append(self, text: str) -> None:
        if text:
            self.pieces.append(text)
            self._length += len(text)
