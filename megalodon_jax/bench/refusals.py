"""Errors by which an implementation refuses a case that a benchmark gives it."""

import jax

REFUSALS = (ValueError, NotImplementedError, jax.errors.JaxRuntimeError)


def first_line(error: Exception) -> str:
    """The error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
