"""The sampling parameters of one request, as the user gives them."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from megalodon_jax.config.ranges import Range

MAX_LOGPROBS = 20
"""The largest `SamplingParams.logprobs`."""
_MAX_SEED = 2**64 - 1
# Dividing by a smaller number overflows or is flushed to zero in float32.
_MIN_TEMPERATURE = 1e-30
_RANGES = {
    "temperature": Range(low=_MIN_TEMPERATURE, special=(0, "greedy")),
    "top_p": Range(low=0.0, high=1.0, open_low=True),
    "min_p": Range(low=0.0, high=1.0),
    "repetition_penalty": Range(low=0.0, open_low=True),
    "presence_penalty": Range(low=-2.0, high=2.0),
    "frequency_penalty": Range(low=-2.0, high=2.0),
}
_WHOLE_RANGES = {
    "top_k": Range(low=0),
    "seed": Range(low=0, high=_MAX_SEED),
    "logprobs": Range(low=0, high=MAX_LOGPROBS),
    "max_tokens": Range(low=1),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are sampled, and where it ends.

    The order of a draw: allowed ids (`logits_mask`), logit bias, repetition penalty, frequency and
    presence penalty, temperature, top-k, top-p of what top-k leaves, min-p of what top-p leaves.

    Raises:
      ValueError: a parameter is out of range; the message names all of them.
    """

    temperature: float = 1.0
    """Divides the logits; 0: greedy decoding."""
    top_k: int = 0
    """Sample from the k most probable tokens; 0: from all."""
    top_p: float = 1.0
    """Sample from the smallest set of most probable tokens whose probability reaches p."""
    min_p: float = 0.0
    """Sample from tokens with at least this share of the most probable token's probability."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or the output."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once per occurrence in the output."""
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    """Added to the logits of these token ids."""
    seed: int | None = None
    """Seed of the draws; None: the caller of `sampling_row` gives one."""
    stop_ids: tuple[int, ...] = ()
    """The row ends after any of these tokens."""
    stop: tuple[str, ...] = ()
    """The row ends before any of these texts."""
    logprobs: int | None = None
    """Log-probabilities of the drawn and the n most probable tokens; 0: of the drawn one; None: no.

    They are the model's: natural logarithms, before mask, bias, penalties, temperature and filters.
    """
    max_tokens: int = 16
    """Largest number of new tokens."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _as_tuple(self.stop, str))
        object.__setattr__(self, "stop_ids", _as_tuple(self.stop_ids, int))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        if faults := [*self._number_faults(), *self._stop_faults(), *self._bias_faults()]:
            raise ValueError("sampling parameters: " + "; ".join(faults))

    def _number_faults(self) -> Iterable[str]:
        for name, allowed in (_RANGES | _WHOLE_RANGES).items():
            value = getattr(self, name)
            if value is None and name in ("seed", "logprobs"):
                continue
            whole = name in _WHOLE_RANGES
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                yield f"{name} is {value!r}; use {'an integer' if whole else 'a number'}"
            elif allowed.problem(value) is not None:
                yield f"{name} is {value}; use {allowed}"

    def _stop_faults(self) -> Iterable[str]:
        for text in self.stop:
            if not isinstance(text, str) or not text:
                yield f"stop has {text!r}; use texts of at least one character"
        for token in self.stop_ids:
            if not _is_token_id(token):
                yield f"stop_ids has {token!r}; use token ids"

    def _bias_faults(self) -> Iterable[str]:
        for token, value in self.logit_bias.items():
            if not _is_token_id(token):
                yield f"logit_bias has the key {token!r}; use token ids"
            elif not isinstance(value, int | float) or Range().problem(value) is not None:
                yield f"logit_bias of token {token} is {value!r}; use a finite number"


class Features(NamedTuple):
    """Features of a compiled draw; static: one program is compiled per value.

    A row that does not use a feature draws the same tokens with and without it. Rows may therefore
    run in any program whose features cover theirs.

    Attributes:
      random: draws at a temperature above 0; without it every row is greedy.
      top_k: the top-k filter.
      top_p: the top-p filter.
      min_p: the min-p filter.
      penalties: repetition, presence and frequency penalty; counts the drawn tokens.
      bias: the logit bias.
      logprobs: log-probabilities of the drawn and the n most probable tokens; None: not computed.
    """

    random: bool = False
    top_k: bool = False
    top_p: bool = False
    min_p: bool = False
    penalties: bool = False
    bias: bool = False
    logprobs: int | None = None

    @classmethod
    def of(cls, params: SamplingParams) -> "Features":
        """Features that a request needs."""
        random = params.temperature > 0.0
        return cls(
            random=random,
            top_k=random and params.top_k > 0,
            top_p=random and params.top_p < 1.0,
            min_p=random and params.min_p > 0.0,
            penalties=params.repetition_penalty != 1.0
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0,
            bias=bool(params.logit_bias),
            logprobs=params.logprobs,
        )

    def union(self, other: "Features") -> "Features":
        """Features that cover both."""
        flags = (mine or theirs for mine, theirs in zip(self[:-1], other[:-1], strict=True))
        counts = [n for n in (self.logprobs, other.logprobs) if n is not None]
        return Features(*flags, logprobs=max(counts, default=None))

    def covers(self, other: "Features") -> bool:
        """Whether rows that need `other` can run with these features."""
        return self.union(other) == self


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _as_tuple(values: object, kind: type) -> tuple:
    # A single text is a sequence of one-character texts: never what is meant.
    if isinstance(values, kind):
        return (values,)
    return tuple(values)  # type: ignore[arg-type]
