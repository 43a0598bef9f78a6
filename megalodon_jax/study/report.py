"""The table of a study: every run, and the means of the seeds."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from megalodon_jax.study.evaluations import EvaluationSeries, EvaluationValue, evaluation_series
from megalodon_jax.study.results import RunResult, StudyResults


class Summary(NamedTuple):
    """Runs of one variant that differ in the seed only.

    Attributes:
      stage: name of the stage.
      variant: name of the variant.
      point: the values of the grid as text.
      runs: those that are done.
      num_failed: number of those that failed.
      mean: mean of the metric over the seeds; NaN without a run.
      deviation: its sample standard deviation; NaN with fewer than two runs.
    """

    stage: str
    variant: str
    point: str
    runs: tuple[RunResult, ...]
    num_failed: int
    mean: float
    deviation: float


def summarize_runs(results: StudyResults) -> list[Summary]:
    """The runs by stage, variant and point of the grid, in the order of the study."""
    groups: dict[tuple[str, str, str], list[RunResult]] = {}
    for run in results.runs:
        groups.setdefault((run.stage, run.variant, run.point_text), []).append(run)
    return [_summary(key, runs, results.metric) for key, runs in groups.items()]


def _summary(key: tuple[str, str, str], runs: Sequence[RunResult], metric: str) -> Summary:
    done = tuple(run for run in runs if run.status == "done")
    values = [run.final.get(metric, math.nan) for run in done]
    mean = sum(values) / len(values) if values else math.nan
    deviation = math.nan
    if len(values) > 1:
        deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return Summary(*key, done, len(runs) - len(done), mean, deviation)


def results_markdown(results: StudyResults) -> str:
    """The results as Markdown: tables of means for every stage and evaluation, then all runs."""
    better = "lower" if results.mode == "min" else "higher"
    lines = [f"# {results.title}", "", f"`{results.metric}`, {better} is better."]
    summaries = summarize_runs(results)
    for stage in dict.fromkeys(summary.stage for summary in summaries):
        own = [summary for summary in summaries if summary.stage == stage]
        lines += ["", f"## {stage}", "", *_stage_table(own)]
    for series in evaluation_series(results):
        title = f"{series.stage}, {series.name}: {series.measure} ({series.task})"
        lines += ["", f"## {title}", "", *_evaluation_table(series)]
    lines += ["", "## All runs", "", *_runs_table(results)]
    return "\n".join(lines) + "\n"


def _stage_table(summaries: Sequence[Summary]) -> list[str]:
    first = [summary for summary in summaries if summary.variant == summaries[0].variant]
    header = (
        "variant", "grid", "seeds", "mean", "deviation", f"mean - {first[0].variant}'s",
        "parameters", "without embeddings", "tokens", "seconds", "tokens/s",
    )  # fmt: skip
    rows = []
    for summary in summaries:
        any_run = summary.runs[0] if summary.runs else None
        same = first if len(first) == 1 else [each for each in first if each.point == summary.point]
        is_compared = bool(same) and summary not in first
        failed = f" ({summary.num_failed} failed)" if summary.num_failed else ""
        rows.append(
            (
                summary.variant,
                summary.point,
                f"{len(summary.runs)}{failed}",
                _number(summary.mean, ".4f"),
                _number(summary.deviation, ".4f"),
                _number(summary.mean - same[0].mean, "+.4f") if is_compared else "",
                f"{any_run.parameters:,}" if any_run else "",
                f"{any_run.parameters_without_embeddings:,}" if any_run else "",
                f"{any_run.tokens:,.0f}" if any_run else "",
                _number(_mean([run.seconds for run in summary.runs]), ",.0f"),
                _number(_mean([run.tokens_per_second for run in summary.runs]), ",.0f"),
            )
        )
    return _table(header, rows)


def _evaluation_table(series: EvaluationSeries) -> list[str]:
    """A line for every length, distance or number of digits, a column for every variant."""
    columns = {
        variant: {value.key: value for value in values}
        for variant, values in series.by_variant.items()
    }
    keys = dict.fromkeys(key for values in columns.values() for key in values)
    header = (*series.keys, *columns)
    rows = [
        (*map(_part, key), *(_with_range(values.get(key)) for values in columns.values()))
        for key in keys
    ]
    return _table(header, rows)


def _part(part: object) -> str:
    return f"{part:,}" if isinstance(part, int) else str(part)


def _with_range(value: EvaluationValue | None) -> str:
    """The mean over the seeds, and their range where they differ."""
    if value is None or math.isnan(value.mean):
        return ""
    if value.low == value.high:
        return f"{value.mean:.4g}"
    return f"{value.mean:.4g} ({value.low:.4g} to {value.high:.4g})"


def _runs_table(results: StudyResults) -> list[str]:
    names = sorted(
        {
            name
            for run in results.runs
            for name in run.final
            if name.startswith(("heldout_bits_per_byte", "heldout_accuracy"))
        }
    )
    evaluations = _accuracies(results)
    header = (
        "run",
        "status",
        *names,
        *evaluations,
        "training loss",
        "seconds",
        "all seconds",
        "device",
    )
    rows = [
        (
            run.name,
            run.status if run.status == "done" else run.describe().replace("\n", " "),
            *(_number(run.final.get(name, math.nan), ".4f") for name in names),
            *(_number(found.get(run.name, math.nan), ".4f") for found in evaluations.values()),
            _number(run.final.get("loss", math.nan), ".4f"),
            _number(run.seconds, ",.0f"),
            _number(run.seconds_total, ",.0f"),
            run.device,
        )
        for run in results.runs
    ]
    return _table(header, rows)


def _accuracies(results: StudyResults) -> dict[str, dict[str, float]]:
    """Accuracies of the evaluations on examples, by name and by the name of the run."""
    found: dict[str, dict[str, float]] = {}
    for run in results.runs:
        for name, content in run.evaluations.items():
            if content.get("task") == "examples":
                accuracy = content["results"][0]["accuracy"]
                found.setdefault(f"{name} accuracy", {})[run.name] = accuracy
    return found


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)
