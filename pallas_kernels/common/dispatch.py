"""Names of implementations, and the check that every operation's `api.py` begins with."""

from collections.abc import Collection
from typing import Literal

Implementation = Literal["reference", "xla", "mosaic_gpu", "pallas_tpu", "triton"]


def check_implementation(
    operation: str, implementation: str | None, known: Collection[str]
) -> None:
    """Raises ValueError, naming the known implementations, if `implementation` is not one of them.

    Args:
      operation: the operation's name, for the message.
      implementation: what was asked for; None asks for the default choice.
      known: names of the operation's implementations.
    """
    if implementation is not None and implementation not in known:
        raise ValueError(
            f"{operation} has no implementation {implementation!r}; "
            f"use one of {', '.join(map(repr, known))} or None"
        )
