"""The fields of a call: what is supported, with types and ranges checked."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from megalodon_jax.data.chat_template import ROLES, Message
from megalodon_jax.errors import did_you_mean
from megalodon_jax.inference.sampling_params import MAX_LOGPROBS, SamplingParams
from megalodon_jax.serve.errors import ApiError

MAX_STOPS = 16
_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty",
)  # fmt: skip
_SHARED = (
    *_SAMPLING, "model", "n", "stream", "stream_options", "logprobs", "logit_bias", "max_tokens",
    "seed", "session", "stop", "user",
)  # fmt: skip
COMPLETION_FIELDS = (*_SHARED, "prompt", "echo")
"""Supported fields of /v1/completions."""
CHAT_FIELDS = (*_SHARED, "messages", "max_completion_tokens", "top_logprobs")
"""Supported fields of /v1/chat/completions."""
# Fields of the API that are refused by name, except with a value that asks for nothing.
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "audio": (), "best_of": (1,), "function_call": ("none",), "functions": ([],),
    "metadata": ({},), "modalities": (["text"],), "moderation": (),
    "parallel_tool_calls": (), "prediction": (), "prompt_cache_key": (),
    "prompt_cache_options": (), "prompt_cache_retention": (), "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},), "safety_identifier": (),
    "service_tier": ("auto", "default"), "store": (False,), "suffix": ("",),
    "tool_choice": ("none",), "tools": ([],), "verbosity": (), "web_search_options": (),
}  # fmt: skip
_LOWEST_SEED, _HIGHEST_SEED = -(2**63), 2**63 - 1
_MOST_BIAS = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """The fields that both endpoints have.

    Attributes:
      model: name of the model.
      params: sampling, stops and number of tokens.
      n: samples of every prompt.
      is_streaming: whether tokens are sent as they come.
      includes_usage: whether a stream ends with the numbers of tokens.
      session: "new", the id of a session, or None.
      user: the client's name for its user; the queue takes turns between users.
    """

    model: str
    params: SamplingParams
    n: int
    is_streaming: bool
    includes_usage: bool
    session: str | None
    user: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionCall(Call):
    """A call of /v1/completions.

    Attributes:
      prompts: texts or token ids.
      echo: whether the answer begins with the prompt.
      drops_answer: whether `max_tokens` is 0: only the prompt is wanted.
    """

    prompts: Sequence[str | Sequence[int]]
    echo: bool
    drops_answer: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatCall(Call):
    """A call of /v1/chat/completions.

    Attributes:
      messages: the conversation; in a session, what is new in it.
    """

    messages: Sequence[Message]


def parse_json(body: bytes) -> dict[str, Any]:
    """The object in the body of a call.

    Raises:
      ApiError: 400: it is no JSON object.
    """
    try:
        found = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(found, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return found


def completion_call(body: Mapping[str, Any], *, max_tokens: int) -> CompletionCall:
    """The call of /v1/completions in a body.

    Args:
      body: the JSON object.
      max_tokens: most tokens of an answer.

    Raises:
      ApiError: 400: a field is unknown, not supported, or has a wrong value.
    """
    fields = _Fields(body, COMPLETION_FIELDS)
    echo = fields.boolean("echo")
    wanted = fields.integer("max_tokens", 0 if echo else 1, max_tokens, default=min(16, max_tokens))
    logprobs = fields.optional_integer("logprobs", 0, MAX_LOGPROBS)
    call = CompletionCall(
        **fields.shared(max(1, wanted), logprobs),
        prompts=_prompts(fields),
        echo=echo,
        drops_answer=wanted == 0,
    )
    if call.session is not None and (call.echo or len(call.prompts) > 1):
        _wrong("session", "a session has one prompt and no echo")
    if call.drops_answer and call.is_streaming:
        _wrong("max_tokens", "max_tokens 0 has nothing to stream; send stream false")
    return call


def chat_call(body: Mapping[str, Any], *, max_tokens: int) -> ChatCall:
    """The call of /v1/chat/completions in a body; arguments and errors as `completion_call`."""
    fields = _Fields(body, CHAT_FIELDS)
    given = [name for name in ("max_tokens", "max_completion_tokens") if fields.has(name)]
    if len(given) == 2:
        _wrong("max_tokens", "max_tokens and max_completion_tokens are one field; send one of them")
    name = given[0] if given else "max_tokens"
    wanted = fields.integer(name, 1, max_tokens, default=max_tokens)
    logprobs = None
    if fields.boolean("logprobs"):
        logprobs = fields.integer("top_logprobs", 0, MAX_LOGPROBS, default=0)
    elif fields.has("top_logprobs"):
        _wrong("top_logprobs", "top_logprobs needs logprobs true")
    return ChatCall(**fields.shared(wanted, logprobs), messages=_messages(fields))


class _Fields:
    """The fields of a body; null counts as absent."""

    def __init__(self, body: Mapping[str, Any], known: Sequence[str]):
        self._given = {name: value for name, value in body.items() if value is not None}
        for name, value in self._given.items():
            if name in known:
                continue
            if name not in _REFUSED or name == "prompt":
                raise ApiError(
                    400, f"unknown field {name!r}{did_you_mean(name, known)}", param=name,
                    code="unknown_parameter",
                )  # fmt: skip
            if not any(value == neutral for neutral in _REFUSED[name]):
                raise ApiError(
                    400, f"the field {name!r} is not supported", param=name,
                    code="unsupported_parameter",
                )  # fmt: skip

    def has(self, name: str) -> bool:
        """Whether the field has a value."""
        return name in self._given

    def get(self, name: str) -> Any:
        """The value; None: absent."""
        return self._given.get(name)

    def required(self, name: str) -> Any:
        """The value of a field that must be there."""
        if name not in self._given:
            raise ApiError(
                400, f"the field {name!r} is missing", param=name,
                code="missing_required_parameter",
            )  # fmt: skip
        return self._given[name]

    def boolean(self, name: str) -> bool:
        """A true or false; absent: false."""
        value = self._given.get(name, False)
        if not isinstance(value, bool):
            _wrong(name, f"{name} is {_shown(value)}; use true or false")
        return value

    def text(self, name: str, value: Any) -> str:
        """A text that can be encoded."""
        if not isinstance(value, str):
            _wrong(name, f"{name} has {_shown(value)}; use a text")
        if any("\ud800" <= character <= "\udfff" for character in value):
            _wrong(name, f"{name} has half of a surrogate pair; send valid Unicode")
        return value

    def optional_integer(self, name: str, low: int, high: int) -> int | None:
        """An integer in a range; None: absent."""
        value = self._given.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            _wrong(name, f"{name} is {_shown(value)}; use an integer")
        if not low <= value <= high:
            _wrong(name, f"{name} is {value}; use {low} to {high}")
        return value

    def integer(self, name: str, low: int, high: int, *, default: int) -> int:
        """An integer in a range."""
        value = self.optional_integer(name, low, high)
        return default if value is None else value

    def shared(self, max_tokens: int, logprobs: int | None) -> dict[str, Any]:
        """Arguments of `Call`."""
        n = self.integer("n", 1, 128, default=1)
        session = self.get("session")
        if session is not None:
            self.text("session", session)
            if n > 1:
                _wrong("session", "a session continues with one answer; send n 1")
        is_streaming = self.boolean("stream")
        return {
            "model": self.text("model", self.required("model")),
            "params": self._params(max_tokens, logprobs),
            "n": n,
            "is_streaming": is_streaming,
            "includes_usage": self._includes_usage(is_streaming),
            "session": session,
            "user": self.text("user", self.get("user") or ""),
        }

    def _params(self, max_tokens: int, logprobs: int | None) -> SamplingParams:
        given = {name: self._given[name] for name in _SAMPLING if name in self._given}
        for name, value in given.items():
            # One at a time, so that the error names the field.
            try:
                SamplingParams(**{name: value})
            except (ValueError, TypeError, OverflowError) as error:
                _wrong(name, str(error).removeprefix("sampling parameters: "))
        seed = self.optional_integer("seed", _LOWEST_SEED, _HIGHEST_SEED)
        # Sample i draws with seed + i, which must fit in 64 bits.
        given["seed"] = None if seed is None else seed % 2**63
        return SamplingParams(
            **given,
            logit_bias=self._logit_bias(),
            stop=self._stops(),
            logprobs=logprobs,
            max_tokens=max_tokens,
        )

    def _stops(self) -> tuple[str, ...]:
        value = self._given.get("stop", ())
        stops = (value,) if isinstance(value, str) else value
        if not isinstance(stops, list | tuple) or len(stops) > MAX_STOPS:
            _wrong("stop", f"stop is {_shown(value)}; use a text or up to {MAX_STOPS} texts")
        for stop in stops:
            if not self.text("stop", stop):
                _wrong("stop", "stop has an empty text; use at least one character")
        return tuple(stops)

    def _logit_bias(self) -> dict[int, float]:
        value = self._given.get("logit_bias", {})
        if not isinstance(value, dict):
            _wrong("logit_bias", f"logit_bias is {_shown(value)}; use an object of token ids")
        bias = {}
        for key, number in value.items():
            if not (key.isascii() and key.isdecimal() and len(key) < 12):
                _wrong("logit_bias", f"logit_bias has the key {_shown(key)}; use token ids")
            if (
                isinstance(number, bool)
                or not isinstance(number, int | float)
                or not -_MOST_BIAS <= number <= _MOST_BIAS
            ):
                _wrong("logit_bias", f"logit_bias of token {key} is {_shown(number)}; use -100 to "
                       "100")  # fmt: skip
            bias[int(key)] = float(number)
        return bias

    def _includes_usage(self, is_streaming: bool) -> bool:
        options = self._given.get("stream_options")
        if options is None:
            return False
        if not isinstance(options, dict) or set(options) - {"include_usage"}:
            _wrong("stream_options", "stream_options has more than include_usage")
        include = options.get("include_usage", False)
        if not isinstance(include, bool):
            _wrong("stream_options", "stream_options.include_usage must be true or false")
        if not is_streaming:
            _wrong("stream_options", "stream_options needs stream true")
        return include


def _prompts(fields: _Fields) -> list[str | list[int]]:
    value = fields.required("prompt")
    if isinstance(value, str):
        return [fields.text("prompt", value)]
    if not isinstance(value, list) or not value:
        _wrong("prompt", f"prompt is {_shown(value)}; use a text, token ids, or a list of these")
    if all(_is_token(each) for each in value):
        return [value]
    for each in value:
        if isinstance(each, str):
            fields.text("prompt", each)
        elif not isinstance(each, list) or not each or not all(map(_is_token, each)):
            _wrong("prompt", f"prompt has {_shown(each)}; use texts or lists of token ids")
    return value


def _messages(fields: _Fields) -> list[Message]:
    value = fields.required("messages")
    if not isinstance(value, list) or not value:
        _wrong("messages", f"messages is {_shown(value)}; use a list of at least one message")
    return [_message(fields, each, f"messages[{index}]") for index, each in enumerate(value)]


def _message(fields: _Fields, value: Any, name: str) -> Message:
    if not isinstance(value, dict):
        _wrong(name, f"{name} is {_shown(value)}; use an object with role and content")
    given = {key for key, each in value.items() if each is not None and each != []}
    if unknown := sorted(given - {"role", "content"}):
        _wrong(f"{name}.{unknown[0]}", f"the field {unknown[0]!r} of {name} is not supported")
    role = value.get("role")
    # The newer name of the same role.
    role = "system" if role == "developer" else role
    if role not in ROLES:
        _wrong(f"{name}.role", f"{name}.role is {_shown(role)}; use {', '.join(ROLES)}")
    return Message(role, _content(fields, value.get("content"), f"{name}.content"))


def _content(fields: _Fields, value: Any, name: str) -> str:
    if not isinstance(value, list):
        return fields.text(name, value)
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            _wrong(name, f"{name} has {_shown(part)}; only parts of the type text are supported")
    return "".join(fields.text(name, part.get("text")) for part in value)


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _wrong(param: str, message: str) -> NoReturn:
    raise ApiError(400, message, param=param, code="invalid_value")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
