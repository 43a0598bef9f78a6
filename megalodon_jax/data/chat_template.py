"""Chat templates: the messages of a conversation as token ids.

A template is a Jinja text, rendered in a sandbox. Special tokens count only where the template
itself writes them: the same text in a message is ordinary text.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from jaxtyping import Bool, Int32

from megalodon_jax.data.generation_blocks import (
    END,
    START,
    TextSpan,
    generation_extension,
    split_at_marks,
    without_marks,
)
from megalodon_jax.data.tokenizer import CHAT_TEMPLATE_FILE, CONFIG_FILE, Tokenizer
from megalodon_jax.errors import DataError
from megalodon_jax.file_limits import FileLimitError, read_bytes

MAX_TEMPLATE_BYTES = 1_000_000
ROLES = ("system", "user", "assistant")
_PLAIN = (
    "{% for message in messages %}"
    "{{ {'system': 'System', 'user': 'User', 'assistant': 'Assistant'}[message.role] }}: "
    "{{ message.content | trim }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
# Unicode noncharacters, which are never part of an exchanged text: the boundary tokens, whose text
# a tokenizer may not have, and a mark inside texts that are not special tokens.
_BOS, _EOS, _MARK = "\ufdd0", "\ufdd1", "\ufdd2"
# The end of an answer that the template has not seen, as letters that no filter changes.
_ANSWER = "ANSWERzq7Xk2"


class Message(NamedTuple):
    """One message of a conversation.

    Attributes:
      role: "system", "user" or "assistant".
      content: its text.
    """

    role: str
    content: str


class ConversationTokens(NamedTuple):
    """Token ids of a conversation.

    Attributes:
      ids: the tokens.
      is_assistant: whether the assistant writes them, the end of an answer included.
    """

    ids: Int32[np.ndarray, " n"]
    is_assistant: Bool[np.ndarray, " n"]


class ChatTemplate:
    """A chat template.

    Args:
      source: the Jinja text. It sees `messages` (with `role` and `content`),
        `add_generation_prompt`, `bos_token` and `eos_token`; `{% generation %}` blocks enclose what
        the assistant writes.
      name: of the template in messages of errors.
      stop: texts that end an answer, for a template without a special token after a message.

    The arguments are attributes of the same names.

    Raises:
      DataError: the text is not a template, or jinja2 is not installed.
    """

    def __init__(self, source: str, *, name: str = "the chat template", stop: Sequence[str] = ()):
        self.source = source
        self.name = name
        self.stop = tuple(stop)
        self.source = source
        try:
            from jinja2 import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise DataError(
                "chat templates need jinja2: pip install 'megalodon-flax[serve]'"
            ) from error
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            autoescape=False,
            extensions=["jinja2.ext.loopcontrols", generation_extension()],
        )
        environment.globals["raise_exception"] = _raise_exception
        environment.filters["tojson"] = _to_json
        try:
            self._template = environment.from_string(source)
        except (TemplateError, RecursionError) as error:
            raise DataError(f"{name} is no Jinja template: {error}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        # A compiled template cannot be pickled, and worker processes of a loader need it.
        return _rebuild, (self.source, self.name, self.stop)

    @classmethod
    def load(cls, spec: str) -> "ChatTemplate":
        """The template that `--chat_template` names.

        Args:
          spec: "plain" ("User: ..." and "Assistant: ..." in lines), or the path of a Jinja file.

        Raises:
          DataError: the file cannot be read or is no template.
        """
        if spec == "plain":
            return cls(_PLAIN, name="the chat template 'plain'", stop=("\nUser:", "\nSystem:"))
        path = Path(spec).expanduser()
        try:
            text = read_bytes(path, max_bytes=MAX_TEMPLATE_BYTES).decode("utf-8")
        except (OSError, FileLimitError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read the chat template {spec}: {error}") from error
        return cls(text, name=f"the chat template {spec}")

    @classmethod
    def of_tokenizer(cls, tokenizer: Tokenizer) -> "ChatTemplate | None":
        """The template in the tokenizer's files; None: it has none.

        `chat_template.jinja` comes before `chat_template` in `tokenizer_config.json`; of several
        templates there it is the one with the name "default".

        Raises:
          DataError: the files hold something else.
        """
        files = tokenizer.files()
        try:
            if CHAT_TEMPLATE_FILE in files:
                text = files[CHAT_TEMPLATE_FILE].decode("utf-8")
                return cls(text, name=f"the tokenizer's {CHAT_TEMPLATE_FILE}")
            found = json.loads(files.get(CONFIG_FILE, b"{}")).get("chat_template")
            if isinstance(found, list):
                found = {each["name"]: each["template"] for each in found}.get("default")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DataError(f"cannot read the tokenizer's chat template: {error!r:.200}") from error
        if found is None:
            return None
        if not isinstance(found, str):
            raise DataError(f"chat_template in {CONFIG_FILE} is {found!r:.80}; it must be a text")
        return cls(found, name=f"the chat template in {CONFIG_FILE}")

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation, for reading: boundary tokens are left out.

        Raises:
          DataError: the template refuses the messages.
        """
        text = self._render(messages, (), add_generation_prompt)
        return text.translate(dict.fromkeys(map(ord, (_BOS, _EOS, _MARK))))

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
    ) -> Int32[np.ndarray, " n"]:
        """Token ids of a conversation; the first is the tokenizer's `bos_id`, as in training.

        Args:
          tokenizer: the model's.
          messages: at least one.
          add_generation_prompt: ends with what begins the assistant's answer.

        Raises:
          DataError: the template refuses the messages.
        """
        text = self._render(messages, special_tokens(tokenizer), add_generation_prompt)
        return encode_rendered(tokenizer, text)

    def render_for_encoding(
        self, tokenizer: Tokenizer, messages: Sequence[Message], *, continues_last: bool = False
    ) -> str:
        """The text of a conversation that `encode_rendered` turns into the ids of `encode`.

        It has noncharacters for boundary tokens and inside texts that only look like special
        tokens; `is_rendered` knows it by the first one.

        Args:
          tokenizer: the model's.
          messages: at least one.
          continues_last: ends inside the last message, which is the start of an answer, instead of
            with what begins an answer.

        Raises:
          DataError: the template refuses the messages, or does not write the last one once.
        """
        special = special_tokens(tokenizer)
        if not continues_last:
            return _MARK + self._render(messages, special, True)
        last = messages[-1]
        marked = [*messages[:-1], last._replace(content=last.content + _ANSWER)]
        text = self._render(marked, special, False)
        if text.count(_ANSWER) != 1:
            raise DataError(
                f"{self.name} does not write the last message once; leave out its start"
            )
        return _MARK + text.partition(_ANSWER)[0]

    def encode_with_mask(
        self, tokenizer: Tokenizer, messages: Sequence[Message]
    ) -> ConversationTokens:
        """Token ids of a conversation with the mask of what the assistant writes.

        These are the `{% generation %}` blocks of the template. Without them they are, for every
        answer, what follows the rendered messages before it and the generation prompt. The text is
        tokenized in these spans, as a model that continues a prompt sees it. The last answer ends
        with `eos_id`: it is added if the template writes none in it or after it.

        Args:
          tokenizer: the model's.
          messages: at least one.

        Raises:
          DataError: the template refuses the messages; or it has no generation blocks, and the
            text of earlier messages depends on later ones.
        """
        special = special_tokens(tokenizer)
        text = self._render(messages, special, False, keeps_marks=True)
        spans = split_at_marks(text) if START in text else self._spans(text, messages, special)
        ids, mask = [tokenizer.bos_id], [False]
        after_answer: list[int] = []
        for span, is_assistant in spans:
            new = _encode(tokenizer, span, special)
            if len(ids) == 1 and new[:1] == ids:
                del new[0]
            ids += new
            mask += [is_assistant] * len(new)
            after_answer = new if is_assistant else [*after_answer, *new]
        if messages[-1].role == "assistant" and tokenizer.eos_id not in after_answer:
            ids.append(tokenizer.eos_id)
            mask.append(True)
        return ConversationTokens(np.asarray(ids, np.int32), np.asarray(mask))

    def _spans(
        self, text: str, messages: Sequence[Message], special: Mapping[str, int]
    ) -> list[TextSpan]:
        """The spans of a text by rendering the messages up to each answer."""
        # A line break after a special token that ends an answer is not the assistant's.
        ends = "|".join(map(re.escape, (*special, _EOS)))
        after_end = re.compile(rf"(?:{ends})(\s+)\Z")
        spans, position = [], 0
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = self._render(messages[:index], special, True, may_be_empty=True)
            through = self._render(messages[: index + 1], special, False)
            if not (text.startswith(through) and through.startswith(before)):
                raise DataError(
                    f"{self.name} renders message {index} in another way before later messages, so "
                    "that the assistant's part is not known; put {% generation %} and "
                    "{% endgeneration %} round it"
                )
            stop = len(through)
            if found := after_end.search(through, len(before)):
                stop = found.start(1)
            spans.append(TextSpan(text[position : len(before)], False))
            spans.append(TextSpan(text[len(before) : stop], True))
            position = stop
        return [*spans, TextSpan(text[position:], False)]

    def encode_turn(
        self, tokenizer: Tokenizer, messages: Sequence[Message], *, answer_has_eos: bool
    ) -> Int32[np.ndarray, " n"]:
        """Token ids that continue a conversation with new messages.

        They begin with what the template writes at the end of an answer, and end with what begins
        the next one. The earlier messages are not needed.

        Args:
          tokenizer: the model's.
          messages: the new ones.
          answer_has_eos: whether the answer before ended with `eos_id`, which is then not repeated.

        Raises:
          DataError: the template refuses the messages, or drops earlier answers.
        """
        special = special_tokens(tokenizer)
        before = [Message("user", "a"), Message("assistant", _ANSWER)]
        text = self._render([*before, *messages], special, True)
        if text.count(_ANSWER) != 1:
            raise DataError(
                f"{self.name} does not write an earlier answer once; send all messages in one "
                "request without a session"
            )
        ids = _encode(tokenizer, text.partition(_ANSWER)[2], special)
        if answer_has_eos and ids and ids[0] == tokenizer.eos_id:
            del ids[0]
        return np.asarray(ids, np.int32)

    def _render(
        self,
        messages: Sequence[Message],
        special: Mapping[str, int] | tuple[()],
        prompt: bool,
        *,
        keeps_marks: bool = False,
        may_be_empty: bool = False,
    ) -> str:
        from jinja2 import TemplateError

        if not messages and not may_be_empty:
            raise DataError("messages is empty; give at least one")
        marked = [
            {"role": role, "content": _mark_special(_checked(content), special)}
            for role, content in messages
        ]
        try:
            text = self._template.render(
                messages=marked, add_generation_prompt=prompt, bos_token=_BOS, eos_token=_EOS
            )
            return text if keeps_marks else without_marks(text)
        # A template is a program: its expressions raise these.
        except (
            TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError,
            RecursionError, OverflowError, MemoryError,
        ) as error:  # fmt: skip
            raise DataError(f"{self.name} refuses the messages: {error}") from error


def _rebuild(source: str, name: str, stop: tuple[str, ...]) -> ChatTemplate:
    return ChatTemplate(source, name=name, stop=stop)


def is_rendered(text: str) -> bool:
    """Whether a text comes from `ChatTemplate.render_for_encoding`."""
    return text.startswith(_MARK)


def encode_rendered(tokenizer: Tokenizer, text: str) -> Int32[np.ndarray, " n"]:
    """Token ids of a text of `ChatTemplate.render_for_encoding`; the first one is `bos_id`.

    Text that was put after it is read in the same way; see `as_ordinary_text`.
    """
    ids = _encode(tokenizer, text, special_tokens(tokenizer))
    if not ids or ids[0] != tokenizer.bos_id:
        ids.insert(0, tokenizer.bos_id)
    return np.asarray(ids, np.int32)


def as_ordinary_text(tokenizer: Tokenizer, text: str) -> str:
    """A text that may follow a rendered one and has no special token for `encode_rendered`.

    Raises:
      DataError: it has a noncharacter that stands for something else in rendered texts.
    """
    return _mark_special(_checked(text), special_tokens(tokenizer))


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Special tokens of a `tokenizer.json` by their text; none of other tokenizers."""
    content = tokenizer.files().get("tokenizer.json")
    if content is None:
        return {}
    added = json.loads(content).get("added_tokens") or ()
    return {each["content"]: each["id"] for each in added if each.get("special")}


def _checked(content: str) -> str:
    reserved = (_BOS, _EOS, _MARK, START, END)
    if found := next((mark for mark in reserved if mark in content), None):
        raise DataError(f"a text of a chat has the noncharacter U+{ord(found):04X}; remove it")
    return content


def _mark_special(content: str, special: Mapping[str, int] | tuple[()]) -> str:
    """Puts a mark into texts that look like special tokens."""
    if not special:
        return content
    pattern = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
    return re.sub(pattern, lambda match: match[0][0] + _MARK + match[0][1:], content)


def _encode(tokenizer: Tokenizer, text: str, special: Mapping[str, int]) -> list[int]:
    known = {**special, _BOS: tokenizer.bos_id, _EOS: tokenizer.eos_id}
    pattern = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
    ids: list[int] = []
    for piece in re.split(f"({pattern})", text):
        if piece in known:
            ids.append(known[piece])
        elif piece:
            ids += tokenizer.encode(piece.replace(_MARK, "")).tolist()
    return ids


def _raise_exception(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    """Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
