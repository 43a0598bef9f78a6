"""Requests of an engine, and the streams of tokens that answer them."""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from megalodon_jax.inference.sampling import Features, SamplingParams

# from megalodon_jax.inference.text import StopStrings, TextStream

if TYPE_CHECKING:
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
      logits_mask: hook for constrained decoding; the engine then reads every token before it draws
        the next one.
    """

    prompt: Sequence[int] | np.ndarray
    params: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    session: "Session | None" = None
    keep_session: bool = False
    client: str = ""
    logits_mask: LogitsMask | None = None

    @property
    def features(self) -> Features:
        """Features of the draw that it needs."""
        return Features.of(self.params)


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Log-probability of a token under the model, and those of the most probable ones."""

    token: float
    top: tuple[tuple[int, float], ...]


class Stream:
    """The tokens of one request, as they come.

    Iterating over it steps the engine until there are new tokens, and ends when the request has
    ended. `text` needs an engine with a tokenizer.

    Attributes:
      request: the request.
      tokens: the tokens so far, without the stop id or the tokens of a stop string.
      logprobs: of these tokens, if the request asked for them.
      finish_reason: None while the request is running.
      session: the state after the tokens, if the request keeps it.
    """

    def __init__(self, request: Request, seed: int, step: Callable[[], None], tokenizer: Any):
        self.request = request
        self.seed = seed
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: FinishReason | None = None
        self.session: Session | None = None
        self._step = step
        self._unread: collections.deque[int] = collections.deque()
        self._text = None if tokenizer is None else _StreamText(tokenizer, request.params.stop)

    @property
    def text(self) -> str:
        """The text so far, without an incomplete character at its end or a stop string.

        Raises:
          ValueError: the engine has no tokenizer.
        """
        if self._text is None:
            raise ValueError("the engine has no tokenizer: pass Engine(..., tokenizer=)")
        return self._text.text

    @property
    def is_finished(self) -> bool:
        """Whether the request has ended."""
        return self.finish_reason is not None

    def __iter__(self) -> Iterator[int]:
        while True:
            while self._unread:
                yield self._unread.popleft()
            if self.is_finished:
                return
            self._step()

    def iterate_text(self) -> Iterator[str]:
        """New text as it comes; steps the engine like iterating over tokens."""
        position = 0
        while True:
            if len(self.text) > position:
                yield self.text[position:]
                position = len(self.text)
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
            self.finish("stop")
            return
        self.tokens.append(token)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        if self._text is not None and (kept := self._text.add(token)) is not None:
            # A stop string: the tokens that make it up are not part of the answer.
            del self.tokens[kept:], self.logprobs[kept:]
            self._trim_unread()
            self.finish("stop")
            return
        self._unread.append(token)
        if len(self.tokens) == params.max_tokens:
            self.finish("length")

    def finish(self, reason: FinishReason) -> None:
        """Ends the stream; the engine calls it."""
        self.finish_reason = reason
        if self._text is not None and not self._text.is_stopped:
            self._text.finish()
            kept = self._text.kept_tokens(len(self.tokens))
            if kept < len(self.tokens):
                del self.tokens[kept:], self.logprobs[kept:]
                self._trim_unread()
                self.finish_reason = "stop"
