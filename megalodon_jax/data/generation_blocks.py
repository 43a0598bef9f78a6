"""The tag `{% generation %}` of chat templates, which encloses what the assistant writes."""

import re
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from jinja2.ext import Extension

# Unicode noncharacters, which are never part of an exchanged text.
START, END = "\ufdd3", "\ufdd4"
_MARKS = re.compile(f"([{START}{END}])")


class TextSpan(NamedTuple):
    """A part of a rendered conversation, and whether the assistant writes it."""

    text: str
    is_assistant: bool


def generation_extension() -> "type[Extension]":
    """The Jinja extension for the tag; a rendered block stands between `START` and `END`."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class GenerationBlocks(Extension):
        tags = {"generation"}  # noqa: RUF012  (Jinja's own type)

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

        def mark(self, caller: Any) -> str:
            return f"{START}{caller()}{END}"

    return GenerationBlocks


def without_marks(text: str) -> str:
    """A rendered text without the marks of generation blocks."""
    return _MARKS.sub("", text)


def split_at_marks(text: str) -> list[TextSpan]:
    """The spans of a rendered text with marks."""
    spans, is_assistant = [], False
    for piece in _MARKS.split(text):
        if piece in (START, END):
            is_assistant = piece == START
        elif piece:
            spans.append(TextSpan(piece, is_assistant))
    return spans
