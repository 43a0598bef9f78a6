"""The objects that answer calls, as OpenAI's clients read them."""

import functools
import math
import secrets
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from megalodon_jax.data.tokenizer import Tokenizer
from megalodon_jax.inference.requests import TokenLogprobs
from megalodon_jax.inference.text import TextStream
from megalodon_jax.serve.engine_thread import Answer, Delta
from megalodon_jax.serve.fields import CompletionCall

# JSON has no infinities: the value that the API gives to the least probable tokens.
_LOWEST_LOGPROB = -9999.0
_REPLACEMENT = "\ufffd"


class Usage(NamedTuple):
    """Numbers of tokens of a call."""

    prompt_tokens: int
    completion_tokens: int

    def as_object(self) -> dict[str, int]:
        """The JSON object."""
        return {**self._asdict(), "total_tokens": sum(self)}


class TokenTexts:
    """Texts of single tokens.

    A token without a text of its own, such as a part of a character or a special token, is written
    as `token_id:65`.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        # Decoders drop the first space of a text.
        self._anchor = tokenizer.encode("a").tolist()
        self._anchor_text = tokenizer.decode(self._anchor)
        self.text = functools.lru_cache(maxsize=65536)(self._text)

    def _text(self, token: int) -> str:
        whole = self.tokenizer.decode([*self._anchor, token])
        text = whole.removeprefix(self._anchor_text)
        if not text or text == whole or _REPLACEMENT in text:
            return f"token_id:{token}"
        return text

    def bytes_of(self, token: int) -> list[int] | None:
        """UTF-8 bytes of a token's text; None: it has no text of its own."""
        text = self.text(token)
        return None if text == f"token_id:{token}" else list(text.encode())


class Form(Protocol):
    """How an endpoint writes the choices of an answer."""

    @property
    def id_prefix(self) -> str:
        """Beginning of the answer's id."""
        ...

    @property
    def object_name(self) -> str:
        """Type of the object of a whole answer."""
        ...

    @property
    def chunk_name(self) -> str:
        """Type of the object of a part of a stream."""
        ...

    def choice(self, delta: Delta, answer: Answer) -> dict[str, Any]:
        """A choice of a whole answer; the delta has all of its tokens."""
        ...

    def chunk_choice(self, delta: Delta, answer: Answer) -> dict[str, Any]:
        """A choice of a part of a stream."""
        ...


class Envelope:
    """The fields that all objects of one answer share."""

    def __init__(self, form: Form, model: str, session_id: str | None):
        self._form = form
        self._shared: dict[str, Any] = {
            "id": f"{form.id_prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }
        if session_id is not None:
            self._shared["session"] = session_id

    def whole(self, choices: Sequence[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        """The object of a whole answer."""
        return {
            **self._shared,
            "object": self._form.object_name,
            "choices": list(choices),
            "usage": usage.as_object(),
        }

    def chunk(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """An object of a stream."""
        return {**self._shared, "object": self._form.chunk_name, "choices": list(choices)}


class CompletionForm:
    """Choices of /v1/completions.

    Args:
      call: the call.
      texts: of tokens.
      prompts: the prompts' tokens, without a boundary token that was put before a text.
    """

    id_prefix = "cmpl"
    object_name = chunk_name = "text_completion"

    def __init__(self, call: CompletionCall, texts: TokenTexts, prompts: Sequence[Sequence[int]]):
        self._call, self._texts, self._prompts = call, texts, prompts
        self._logprobs: dict[int, _CompletionLogprobs] = {}
        self._started: set[int] = set()

    def choice(self, delta: Delta, answer: Answer) -> dict[str, Any]:
        """A choice of a whole answer or of a part of a stream."""
        text = "" if self._call.drops_answer else delta.text
        fresh = delta.index not in self._started
        self._started.add(delta.index)
        prompt_index = delta.index // answer.n
        logprobs = None
        if self._call.params.logprobs is not None:
            if fresh:
                self._logprobs[delta.index] = _CompletionLogprobs(self._texts)
            writer = self._logprobs[delta.index]
            logprobs = _CompletionLogprobs.empty()
            if fresh and self._call.echo:
                tokens = self._prompts[prompt_index]
                entries = answer.prompt_logprobs[prompt_index]
                writer.write(logprobs, tokens, entries[len(entries) - len(tokens) :])
            if not self._call.drops_answer:
                writer.write(logprobs, delta.tokens, delta.logprobs)
        if fresh and self._call.echo:
            text = self._prompt_text(prompt_index) + text
        return {
            "index": delta.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
        }

    chunk_choice = choice

    def _prompt_text(self, index: int) -> str:
        given = self._call.prompts[index]
        return given if isinstance(given, str) else self._texts.tokenizer.decode(given)


class _CompletionLogprobs:
    """Log-probabilities in the older form: lists that run with the tokens."""

    def __init__(self, texts: TokenTexts):
        self._texts, self._stream = texts, TextStream(texts.tokenizer)
        self._offset = 0

    @staticmethod
    def empty() -> dict[str, list[Any]]:
        return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def write(
        self,
        target: dict[str, list[Any]],
        tokens: Sequence[int],
        entries: Sequence[TokenLogprobs | None],
    ) -> None:
        for token, entry in zip(tokens, entries, strict=True):
            text = self._texts.text(token)
            target["tokens"].append(text)
            target["text_offset"].append(self._offset)
            self._offset += len(self._stream.feed([token]))
            if entry is None:
                target["token_logprobs"].append(None)
                target["top_logprobs"].append(None)
                continue
            top = {self._texts.text(other): _finite(value) for other, value in entry.top}
            target["token_logprobs"].append(_finite(entry.token))
            target["top_logprobs"].append(top | {text: _finite(entry.token)})


class ChatForm:
    """Choices of /v1/chat/completions."""

    id_prefix = "chatcmpl"
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def __init__(self, texts: TokenTexts, *, has_logprobs: bool):
        self._texts, self._has_logprobs = texts, has_logprobs
        self._started: set[int] = set()

    def choice(self, delta: Delta, answer: Answer) -> dict[str, Any]:
        """A choice of a whole answer."""
        del answer
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return self._choice(delta, "message", message)

    def chunk_choice(self, delta: Delta, answer: Answer) -> dict[str, Any]:
        """A choice of a part of a stream."""
        del answer
        content = {"content": delta.text}
        if delta.index not in self._started:
            self._started.add(delta.index)
            content = {"role": "assistant", **content}
        return self._choice(delta, "delta", content)

    def _choice(self, delta: Delta, name: str, content: dict[str, Any]) -> dict[str, Any]:
        logprobs = None
        if self._has_logprobs:
            pairs = zip(delta.tokens, delta.logprobs, strict=True)
            logprobs = {"content": [self._entry(*pair) for pair in pairs], "refusal": None}
        return {
            "index": delta.index,
            name: content,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
        }

    def _entry(self, token: int, entry: TokenLogprobs) -> dict[str, Any]:
        top = [self._token(other, value) for other, value in entry.top]
        return {**self._token(token, entry.token), "top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._texts.text(token),
            "logprob": _finite(logprob),
            "bytes": self._texts.bytes_of(token),
        }


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LOWEST_LOGPROB
