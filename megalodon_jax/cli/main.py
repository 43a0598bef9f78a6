"""The `megalodon` command: parses the command line and runs one command."""

import dataclasses
import functools
import logging
import operator
import os
import re
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Annotated, Any

import tyro

from megalodon_jax.cli.command import Command
from megalodon_jax.cli.commands import BENCHMARKS, COMMANDS
from megalodon_jax.cli.exit_codes import exit_code
from megalodon_jax.cli.run_config import default_settings
from megalodon_jax.config.checks import collect_faults
from megalodon_jax.errors import ConfigError, MegalodonError, did_you_mean
from megalodon_jax.presets import config_names
from megalodon_jax.version import __version__

DEBUG_VARIABLE = "MEGALODON_DEBUG"
# Commands whose first argument is a configuration.
_WITH_CONFIG = ("train", "plan")
_SEPARATOR_OPTION = re.compile(r"(--\S*document_separator)(?:=(.*))?", re.DOTALL)
# An argument cannot hold NUL, and a shell makes line ends hard to write.
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|([0nrtf\\]))")
_ESCAPED = {"0": "\0", "n": "\n", "r": "\r", "t": "\t", "f": "\f", "\\": "\\"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the process's exit code (`exit_codes`).

    Args:
      argv: arguments after the program's name; None: those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or bool(os.environ.get(DEBUG_VARIABLE))
    arguments = [argument for argument in arguments if argument != "--debug"]
    if arguments == ["--version"]:
        print(f"megalodon-flax {__version__}")
        return 0
    if not debug:
        # Orbax reports a failed save with hundreds of lines of tracebacks before it raises.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        # Its last retry logs a traceback; the error itself is raised.
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    if arguments in ([], ["bench"]):
        # A name is missing: the help lists those that there are.
        _run(lambda: parse([*arguments, "--help"]).run(), debug=debug)
        return 2
    return _run(lambda: parse(arguments).run(), debug=debug)


def parse(arguments: Sequence[str]) -> Command:
    """The command that the arguments ask for.

    Raises:
      ConfigError: an unknown command, or a configuration that cannot be read.
      SystemExit: help was asked for, or an option is wrong.
    """
    name, *rest = _with_separators(arguments)
    _check_known("command", name, COMMANDS)
    if name == "bench":
        _check_known("benchmark", rest[0], BENCHMARKS)
    choices = [
        _subcommand(command, rest if command == name else ["--help"]) for command in COMMANDS
    ]
    with collect_faults():
        return tyro.cli(
            functools.reduce(operator.or_, choices),
            args=[name, *rest],
            prog="megalodon",
            description=_description(),
            use_underscores=True,
            config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitSubcommandPrefixes),
        )


def _with_separators(arguments: Sequence[str]) -> list[str]:
    r"""The arguments; `\0`, `\n`, `\u0000` and the like in a document separator are decoded."""

    def decode(text: str) -> str:
        return _ESCAPE.sub(lambda found: _decode_escape(found[1], found[2]), text)

    decoded: list[str] = []
    is_value = False
    for argument in arguments:
        option = _SEPARATOR_OPTION.fullmatch(argument)
        if is_value:
            decoded.append(decode(argument))
        elif option is not None and option[2] is not None:
            decoded.append(f"{option[1]}={decode(option[2])}")
        else:
            decoded.append(argument)
        is_value = not is_value and option is not None and option[2] is None
    return decoded


def _decode_escape(code: str | None, letter: str) -> str:
    return chr(int(code, 16)) if code else _ESCAPED[letter]


def _check_known(kind: str, name: str, known: Collection[str]) -> None:
    if not name.startswith("-") and name not in known:
        hint = did_you_mean(name, known) or f"; use one of {', '.join(known)}"
        raise ConfigError(f"unknown {kind} {name!r}{hint}")


def _subcommand(name: str, arguments: Sequence[str]) -> Any:
    """The type of one command as tyro reads it, with the defaults that its CONFIG gives."""
    command = COMMANDS[name]
    if name in _WITH_CONFIG:
        settings: Any = default_settings(arguments)
        # The model's settings depend on its kind.
        kind = Annotated[type(settings), tyro.conf.arg(name="")]
        command = dataclasses.make_dataclass(
            command.__name__,
            [("settings", kind, dataclasses.field(default=settings))],
            bases=(command,),
            namespace={"__doc__": command.__doc__},
            frozen=True,
            kw_only=True,
        )
    return Annotated[command, tyro.conf.subcommand(name, prefix_name=False)]


def _description() -> str:
    return (
        "MEGALODON in JAX: train, evaluate and run language models with unlimited context. "
        f"Shipped configurations: {', '.join(config_names())}. --version prints the version; "
        "--debug after any command shows tracebacks."
    )


def _run(command: Callable[[], int], *, debug: bool) -> int:
    try:
        return command()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt as stop:
        # A run that trains handles its signals itself (`training.signals`).
        print("megalodon: interrupted", file=sys.stderr)
        return exit_code(stop)
    except BrokenPipeError:
        # The reader of the output has gone (`| head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, RuntimeError, OSError, OverflowError) as error:
        if debug:
            raise
        print(f"megalodon: error: {error}", file=sys.stderr)
        if not isinstance(error, OSError | MegalodonError):
            print(f"megalodon: set {DEBUG_VARIABLE}=1 for the traceback", file=sys.stderr)
        return exit_code(error)
