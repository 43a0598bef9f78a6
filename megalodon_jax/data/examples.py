"""Examples of supervised fine-tuning: records with a prompt and a response, or a conversation."""

import hashlib
import json
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from megalodon_jax.data.chat_template import ROLES, ChatTemplate, Message
from megalodon_jax.data.tokenizer import Tokenizer
from megalodon_jax.errors import DataError

TooLong = Literal["drop", "truncate"]


class ExampleFormat(NamedTuple):
    """How records become examples.

    Attributes:
      template: of conversations; None: records with `messages` are refused.
      max_length: most input tokens of an example.
      too_long: longer examples are left out, or lose their end.
    """

    template: ChatTemplate | None
    max_length: int
    too_long: TooLong

    def settings(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the saved one, as JSON values."""
        source = None if self.template is None else self.template.source.encode("utf-8")
        template = None if source is None else hashlib.sha256(source).hexdigest()[:16]
        return {
            "chat_template": template,
            "max_length": self.max_length,
            "too_long": self.too_long,
        }


class Example(NamedTuple):
    """One example.

    Attributes:
      stream: the token before the first target, then the targets up to the last of a response.
      is_response: targets that the loss counts.
    """

    stream: Int32[np.ndarray, " n"]
    is_response: Bool[np.ndarray, " n-1"]


def encode_example(text: str, tokenizer: Tokenizer, template: ChatTemplate | None) -> Example:
    """The tokens of a record.

    `{"prompt": ..., "response": ...}` (or `completion`) is bos, prompt, response, eos, each text
    tokenized alone; the loss counts the response and eos. `{"messages": [{"role": ..., "content":
    ...}, ...]}` goes through the chat template; the loss counts what the assistant writes.

    Raises:
      DataError: the record has another form, or the template refuses the messages.
    """
    try:
        record = json.loads(text)
    # Numbers of more than 4,300 digits and deep nesting have errors of their own.
    except (ValueError, RecursionError) as error:
        raise DataError(f"not a line of JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"expected an object, got {record!r:.80}")
    if "messages" in record:
        ids, mask = _encode_conversation(record, tokenizer, template)
    else:
        ids, mask = _encode_pair(record, tokenizer)
    is_response = mask[1:]
    # Tokens after the last response would be computed for nothing.
    count = int(np.flatnonzero(is_response)[-1]) + 1 if is_response.any() else 0
    return Example(ids[: count + 1], is_response[:count])


def _encode_pair(record: dict[str, Any], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    names = [name for name in ("response", "completion") if name in record]
    if "prompt" not in record or len(names) != 1:
        raise DataError(
            f"the record has the fields {', '.join(map(str, record))}; an example has messages, or "
            "prompt and response (or completion)"
        )
    prompt, response = (_text(record, name) for name in ("prompt", names[0]))
    if not response:
        raise DataError(f"{names[0]} is empty")
    parts = [[tokenizer.bos_id], *map(tokenizer.encode, (prompt, response)), [tokenizer.eos_id]]
    ids = np.concatenate(parts).astype(np.int32)
    return ids, np.arange(len(ids)) >= len(ids) - len(parts[2]) - 1


def _encode_conversation(
    record: dict[str, Any], tokenizer: Tokenizer, template: ChatTemplate | None
) -> tuple[np.ndarray, np.ndarray]:
    if template is None:
        raise DataError(
            "the record has messages, and the tokenizer has no chat template; name one in "
            "sft.chat_template, such as plain"
        )
    if record.get("tools"):
        raise DataError("the record has tools, which conversations here have not")
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"messages is {messages!r:.80}; it must be a list with a message")
    return template.encode_with_mask(tokenizer, [_message(entry) for entry in messages])


def _message(entry: Any) -> Message:
    if not isinstance(entry, dict) or entry.get("role") not in ROLES:
        raise DataError(f"a message is {entry!r:.80}; it must have a role of {', '.join(ROLES)}")
    if entry.get("tool_calls"):
        raise DataError("a message has tool_calls, which conversations here have not")
    return Message(entry["role"], _text(entry, "content"))


def _text(entry: dict[str, Any], name: str) -> str:
    value = entry.get(name)
    if not isinstance(value, str):
        raise DataError(f"{name} is {value!r:.80}; it must be a text")
    # JSON can express lone surrogates, UTF-8 cannot.
    return value.encode("utf-8", errors="replace").decode("utf-8")
