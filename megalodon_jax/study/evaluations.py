"""The results of a study's evaluations by variant, for tables and pictures."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from megalodon_jax.study.results import RunResult, StudyResults

# The keys of an evaluation's lines, the value that is compared, and the words of the axis.
_MEASURES: dict[str, tuple[tuple[str, ...], str, str]] = {
    "perplexity_by_context": (("context",), "perplexity", "tokens of context"),
    "loss_by_position": (("last",), "loss", "tokens seen, at most"),
    "passkey": (("length", "position"), "exact_match", "tokens of the prompt"),
    "copy": (("distance",), "exact_match", "distance in tokens"),
    "recall": (("distance",), "exact_match", "distance in tokens"),
    "addition": (("digits",), "exact_match", "digits"),
    "prefill_cost": (("length", "rows"), "seconds", "tokens of the prompt"),
}


class EvaluationValue(NamedTuple):
    """The value of one line of an evaluation.

    Attributes:
      key: of the line, such as (4096, "start") of a passkey.
      mean: mean over the seeds; NaN without a value.
      low: lowest of the seeds.
      high: highest.
    """

    key: tuple[Any, ...]
    mean: float
    low: float
    high: float


class EvaluationSeries(NamedTuple):
    """One evaluation after the runs of one stage.

    Attributes:
      stage: name of the stage.
      name: name of the evaluation.
      task: its task.
      keys: names of the parts of a key; the first is a number.
      measure: name of the value.
      axis: words for the first part.
      by_variant: the values of every variant that has some, in the order of the runs.
    """

    stage: str
    name: str
    task: str
    keys: tuple[str, ...]
    measure: str
    axis: str
    by_variant: dict[str, list[EvaluationValue]]


def evaluation_series(results: StudyResults) -> list[EvaluationSeries]:
    """The evaluations that compare variants, by stage and name."""
    groups: dict[tuple[str, str, str], list[RunResult]] = {}
    for run in results.runs:
        for name, content in run.evaluations.items():
            if content.get("task") in _MEASURES:
                groups.setdefault((run.stage, name, content["task"]), []).append(run)
    return [_series(stage, name, task, runs) for (stage, name, task), runs in groups.items()]


def _series(stage: str, name: str, task: str, runs: Sequence[RunResult]) -> EvaluationSeries:
    keys, measure, axis = _MEASURES[task]
    found: dict[str, dict[tuple[Any, ...], list[float]]] = {}
    for run in runs:
        own = found.setdefault(_label(run), {})
        for line in run.evaluations[name]["results"]:
            value = line[measure]
            own.setdefault(tuple(line[key] for key in keys), []).extend(
                [] if value is None else [float(value)]
            )
    by_variant = {
        label: [_value(key, values) for key, values in own.items()] for label, own in found.items()
    }
    return EvaluationSeries(stage, name, task, keys, measure, axis, by_variant)


def _label(run: RunResult) -> str:
    return f"{run.variant}, {run.point_text}" if run.point else run.variant


def _value(key: tuple[Any, ...], values: Sequence[float]) -> EvaluationValue:
    if not values:
        return EvaluationValue(key, math.nan, math.nan, math.nan)
    return EvaluationValue(key, sum(values) / len(values), min(values), max(values))
