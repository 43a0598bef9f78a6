"""Ranges of the settings, written beside the fields: `lr: Annotated[float, Range(...)]`.

`megalodon_jax.config.checks` enforces them; help texts and the settings tables of the documentation
show them.
"""

import math
import numbers
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from megalodon_jax.storage.location import is_store, location_problem

# Whole numbers above it are limits against slips of the keyboard, not worth a line of help.
_SANITY_LIMIT = 100_000
_LARGEST_FLOAT32 = 3.4028234663852886e38


@dataclass(frozen=True, kw_only=True)
class Range:
    """Allowed values of a number; a float is finite in float32 in any case.

    Attributes:
      low: smallest value; None: no bound.
      high: largest value; None: no bound.
      open_low: excludes `low` itself.
      open_high: excludes `high` itself.
      special: a value outside the bounds that is allowed as well, and its meaning.
    """

    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False
    special: tuple[int, str] | None = None

    def problem(self, value: Any) -> str | None:
        """Text on what a number must be, such as "must be positive"; None if it is in range."""
        if self.special is not None and value == self.special[0]:
            return None
        is_low = self.low is not None and (value <= self.low if self.open_low else value < self.low)
        is_high = self.high is not None and (
            value >= self.high if self.open_high else value > self.high
        )
        if not is_low and not is_high:
            return None if _is_finite(value) else "must be finite in float32"
        return self._requirement(is_low=is_low) + self._special_text()

    def __str__(self) -> str:
        if self.low is None and self.high is None:
            return "finite"
        if self.high is None or (_is_whole(self.high) and self.high >= _SANITY_LIMIT):
            text = f"more than {self.low:g}" if self.open_low else f"at least {self.low:g}"
        elif _is_whole(self.high) and _is_whole(self.low) and not (self.open_low or self.open_high):
            text = f"{self.low:,} to {self.high:,}"
        else:
            text = self._interval()
        return text + self._special_text()

    def _requirement(self, *, is_low: bool) -> str:
        whole = _is_whole(self.low) and _is_whole(self.high)
        if self.high is not None and (not whole or self.high <= 1000):
            return f"use {self}" if whole else f"must be in {self._interval()}"
        if not is_low:
            return f"must be at most {self.high:,}"
        if self.low == 0:
            return "must be positive" if self.open_low else "must not be negative"
        return f"must be at least {self.low:g}"

    def _interval(self) -> str:
        low = "-inf" if self.low is None else f"{self.low:g}"
        high = "inf" if self.high is None else f"{self.high:g}"
        return f"{'(' if self.open_low else '['}{low}, {high}{')' if self.open_high else ']'}"

    def _special_text(self) -> str:
        return "" if self.special is None else f", or {self.special[0]} for {self.special[1]}"


@dataclass(frozen=True, kw_only=True)
class Text:
    """Allowed texts: by default without NUL, which no path and no name contains.

    Attributes:
      may_be_empty: whether "" is allowed.
      is_content: whether the text is content of documents: NUL is allowed, but it must be Unicode
        that UTF-8 can express.
      location: the text is a local path, or a path or URL of a known object store; empty: neither.
    """

    may_be_empty: bool = True
    is_content: bool = False
    location: Literal["", "local", "any"] = ""

    def problem(self, value: Any) -> str | None:
        """Text on what a value must be; None if it is allowed."""
        if not value and not self.may_be_empty:
            return "must not be empty"
        if self.is_content:
            is_unicode = not any("\ud800" <= letter <= "\udfff" for letter in value)
            return None if is_unicode else "must be Unicode text without surrogates"
        if "\0" in value:
            return "must not contain NUL"
        if self.location and (problem := location_problem(value)):
            return problem
        if self.location == "local" and is_store(value):
            return "must be a local path"
        return None


# Limits far above what any machine holds: they catch slips of the keyboard before memory does.
Size = Annotated[int, Range(low=1, high=1_000_000)]
"""Width or count in a model or a batch."""
TokenIds = Annotated[int, Range(low=1, high=100_000_000)]
"""Size of a vocabulary."""
Tokens = Annotated[int, Range(low=1, high=2_000_000_000)]
"""Length of a sequence, or part of one."""
Steps = Annotated[int, Range(low=1, high=2_000_000_000)]
"""Number of updates, at least one."""
Interval = Annotated[int, Range(low=0, high=2_000_000_000)]
"""Number of updates or batches between events, or a count; may be 0."""
Seed = Annotated[int, Range(low=0, high=2**32 - 1)]
"""Seed of random numbers."""
Rate = Annotated[float, Range(low=0.0, high=1.0, open_high=True)]
"""Probability, fraction or decay rate below 1."""
Ratio = Annotated[float, Range(low=0.0, high=1.0)]
"""Fraction that may be 1."""
Weight = Annotated[float, Range(low=0.0)]
"""Coefficient of a term, at least 0."""
Location = Annotated[str, Text(location="any")]
"""Local path, or URL of an object store; may be empty."""
RequiredLocation = Annotated[str, Text(may_be_empty=False, location="any")]
"""Local path, or URL of an object store."""
LocalPath = Annotated[str, Text(location="local")]
"""Local path; may be empty."""
Content = Annotated[str, Text(is_content=True)]
"""Text that is tokenized or found in documents."""


def plain_type(kind: Any) -> Any:
    """The type of a field without its annotations."""
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def range_of(kind: Any) -> Range | Text | None:
    """The range beside a field's type; None if it has none."""
    annotations = get_args(kind)[1:] if get_origin(kind) is Annotated else ()
    return next((entry for entry in annotations if isinstance(entry, Range | Text)), None)


def _is_finite(value: Any) -> bool:
    try:
        # Settings become float32 in the step; beyond its largest number they would be infinite.
        return math.isfinite(value) and abs(value) <= _LARGEST_FLOAT32
    except OverflowError:  # an int that no float can hold
        return False


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral)
