"""Help texts of options, from the docstrings under dataclass fields."""

import dataclasses
from typing import Annotated, Any

import docstring_parser
import tyro

from megalodon_jax.config.checks import number_or_none
from megalodon_jax.config.ranges import Range, range_of


def field_docs(config: type) -> dict[str, str]:
    """The docstring under every field of a dataclass, base classes included, on one line each."""
    docs: dict[str, str] = {}
    for cls in reversed(config.__mro__):
        if dataclasses.is_dataclass(cls):
            for entry in docstring_parser.parse_from_object(cls).params:
                docs[entry.arg_name] = " ".join((entry.description or "").split())
    return docs


def _number_or_none(number: type) -> Any:
    """How the command line reads `int | None` and `float | None`: "none" as in TOML, or "None"."""

    def read(arguments: list[str]) -> Any:
        (text,) = arguments
        return None if text in ("none", "None") else number(text)

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{number.__name__.upper()}|none",
        instance_from_str=read,
        is_instance=lambda value: value is None or isinstance(value, int | number),
        str_from_instance=lambda value: ["none" if value is None else str(value)],
    )


def described(options: type) -> Any:
    """A subclass of a dataclass of options whose help texts are not broken at source lines."""
    docs = field_docs(options)
    fields = []
    for entry in dataclasses.fields(options):
        if entry.name not in docs:
            continue
        default = dataclasses.field(
            default=entry.default, default_factory=entry.default_factory, kw_only=True
        )  # type: ignore[call-overload]
        allowed = range_of(entry.type)
        # Brackets are markup of `rich`, which prints the help.
        limits = f" Range: {allowed}." if isinstance(allowed, Range) else ""
        kind = Annotated[entry.type, tyro.conf.arg(help=docs[entry.name] + limits)]
        if number := number_or_none(entry.type):
            kind = Annotated[kind, _number_or_none(number)]
        fields.append((entry.name, kind, default))
    return dataclasses.make_dataclass(
        options.__name__,
        fields,
        bases=(options,),
        namespace={"__doc__": options.__doc__},
        frozen=True,
        kw_only=True,
    )
