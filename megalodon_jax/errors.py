"""The errors of this package. A message says what came in and what to do.

All derive from `MegalodonError`; the command line prints their messages without a traceback.
"""

import difflib
from collections.abc import Iterable


class MegalodonError(Exception):
    """Base of all errors that this package raises about its input."""


class ConfigError(MegalodonError, ValueError):
    """A configuration or a command that cannot be used."""


class DataError(MegalodonError, ValueError):
    """Data that cannot be used; the message names the file or setting."""


class CheckpointError(MegalodonError, RuntimeError):
    """A checkpoint could not be written or read; the message says which and what remains."""


class IncompleteCheckpointError(CheckpointError):
    """A checkpoint has no manifest: its save was interrupted, or an older version wrote it."""


class StoreUnreachableError(CheckpointError):
    """An object store gives no answer or no permission; the checkpoint itself may be good."""


class RunLockedError(MegalodonError, RuntimeError):
    """Another process owns the run directory; the message names it."""


class MismatchError(CheckpointError):
    """A checkpoint is intact but belongs to another model, other data, or another tokenizer."""


class TrainingError(MegalodonError, RuntimeError):
    """Training cannot continue; the message names the checkpoint to resume from."""


class ConvertError(MegalodonError, ValueError):
    """A checkpoint that cannot be converted."""


class StateDictError(ConvertError):
    """Arrays that do not fit the model of a configuration; the message names every one."""


class TorchFileError(ConvertError):
    """A file that is not a torch checkpoint, or holds more than arrays and plain values."""


class RequestError(MegalodonError, ValueError):
    """A request of generation that cannot be run."""


class EngineBusyError(MegalodonError, RuntimeError):
    """An engine's queue is full."""


class SessionError(MegalodonError, ValueError):
    """A saved session that is damaged, or belongs to another model."""


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks; characters that do not print are escaped."""
    text = " ".join(str(error).split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` with the known name closest to `name`; empty if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
