"""Pictures of a study's results as SVG, with matplotlib (extra `plots`)."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megalodon_jax.errors import ConfigError
from megalodon_jax.study.evaluations import EvaluationSeries, evaluation_series
from megalodon_jax.study.report import Summary, summarize_runs
from megalodon_jax.study.results import CurvePoint, RunResult, StudyResults

# Colors that readers with impaired color vision can tell apart (Okabe and Ito 2008).
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_STYLES = ("-", "--", ":", "-.")
_SIZE = (6.4, 4.2)
# Fewer tokens are start-up: the axis begins where the curves are worth comparing.
_SHOWN_FROM = 0.1


def draw_results(results: StudyResults, directory: str | Path) -> list[Path]:
    """Draws the last stage with the metric, against tokens and seconds, the variants' final values
    there, and every evaluation by length, distance or digits.

    The same results always give the same bytes.

    Args:
      results: the study's results.
      directory: where the pictures go, named `<study>_<picture>.svg`.

    Returns:
      The files.

    Raises:
      ConfigError: matplotlib is not installed, or no run of the last stage is done.
    """
    summaries = [summary for summary in summarize_runs(results) if summary.runs]
    if not summaries:
        raise ConfigError(f"no run of {results.name} is done; nothing to draw")
    stages = [s.stage for s in summaries if any(results.metric in run.final for run in s.runs)]
    summaries = [s for s in summaries if s.stage == (stages or [summaries[-1].stage])[-1]]
    pictures: dict[str, Callable[[Any], None]] = {
        "tokens": lambda axes: _curves(axes, summaries, results.metric, by="tokens"),
        "seconds": lambda axes: _curves(axes, summaries, results.metric, by="seconds"),
        "final": lambda axes: _final(axes, summaries, results.metric),
    }
    all_series = evaluation_series(results)
    names = [series.name for series in all_series]
    for series in all_series:
        # An evaluation after several stages has a picture for each.
        name = series.name if names.count(series.name) == 1 else f"{series.name}_{series.stage}"
        pictures[name] = lambda axes, series=series: _evaluation(axes, series)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    return [
        _draw(directory / f"{results.name}_{name}.svg", results.title, paint)
        for name, paint in pictures.items()
    ]


def _draw(path: Path, title: str, paint: Callable[[Any], None]) -> Path:
    matplotlib = _matplotlib()
    from matplotlib.figure import Figure

    # Fixed ids and no date: the file changes only with the results.
    with matplotlib.rc_context({"svg.hashsalt": path.name, "svg.fonttype": "none"}):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        axes.set_title(title)
        axes.grid(visible=True, color="#d8dee4", linewidth=0.8)
        axes.set_axisbelow(True)
        paint(axes)
        figure.savefig(path, format="svg", metadata={"Date": None})
    return path


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(
            "pictures need matplotlib: pip install 'megalodon-flax[plots]'"
        ) from error
    return matplotlib


def _curves(axes: Any, summaries: Sequence[Summary], metric: str, *, by: str) -> None:
    """Mean over the seeds, with a band from the lowest to the highest."""
    highest, lowest = -math.inf, math.inf
    for color, summary in zip(_cycle(), summaries, strict=False):
        curves = [_heldout(run, metric) for run in summary.runs]
        length = min(map(len, curves))
        if length == 0:
            continue
        x = np.mean([[getattr(p, by) for p in curve[:length]] for curve in curves], axis=0)
        y = np.array([[p.values[metric] for p in curve[:length]] for curve in curves])
        axes.plot(x, y.mean(0), color=color, label=_label(summary, summaries))
        axes.fill_between(x, y.min(0), y.max(0), color=color, alpha=0.2, linewidth=0)
        shown = y[:, x >= _SHOWN_FROM * x[-1]]
        lowest, highest = min(lowest, shown.min()), max(highest, shown.max())
    if highest > lowest:
        margin = 0.05 * (highest - lowest)
        axes.set_ylim(lowest - margin, highest + margin)
    axes.set_xlabel("trained tokens" if by == "tokens" else "seconds of training steps")
    axes.set_ylabel(_words(metric))
    axes.legend(frameon=False)


def _final(axes: Any, summaries: Sequence[Summary], metric: str) -> None:
    """A bar for every variant's mean, a point for every seed; the axis does not begin at zero."""
    values = [[run.final[metric] for run in s.runs if metric in run.final] for s in summaries]
    found = [value for own in values for value in own]
    if not found:
        return
    span = max(max(found) - min(found), 1e-3)
    left = min(found) - 0.5 * span
    for place, (color, own) in enumerate(zip(_cycle(), values, strict=False)):
        axes.barh(place, np.mean(own) - left, left=left, color=color, alpha=0.35, height=0.6)
        axes.plot(own, [place] * len(own), "o", color=color, markersize=5)
        axes.annotate(f"{np.mean(own):.4f}", (left, place), xytext=(4, 0),
                      textcoords="offset points", va="center", fontsize=9)  # fmt: skip
    axes.set_yticks(range(len(summaries)), [_label(s, summaries) for s in summaries])
    axes.invert_yaxis()
    axes.set_xlim(left, max(found) + 0.1 * span)
    axes.set_xlabel(f"{_words(metric)} (axis does not begin at zero)")


def _evaluation(axes: Any, series: EvaluationSeries) -> None:
    """The mean over the seeds by the first part of the key, a line style for every other part."""
    others = list(dict.fromkeys(v.key[1:] for values in series.by_variant.values() for v in values))
    highest = 0
    for color, (variant, values) in zip(_cycle(), series.by_variant.items(), strict=False):
        for style, other in zip(itertools.cycle(_STYLES), others, strict=False):
            # A context of 0, a whole document, has no place on the axis.
            own = sorted(v for v in values if v.key[1:] == other and v.key[0])
            if not own:
                continue
            x = [value.key[0] for value in own]
            label = ", ".join([variant, *map(str, other)]) if len(others) > 1 else variant
            axes.plot(x, [v.mean for v in own], "o", linestyle=style, color=color, label=label)
            axes.fill_between(
                x, [v.low for v in own], [v.high for v in own], color=color, alpha=0.2, linewidth=0
            )
            highest = max(highest, *x)
    if highest > 256:
        axes.set_xscale("log", base=2)
    if series.measure == "exact_match":
        axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel(series.axis)
    axes.set_ylabel(series.measure.replace("_", " "))
    axes.legend(frameon=False)


def _heldout(run: RunResult, metric: str) -> list[CurvePoint]:
    return [point for point in run.heldout if metric in point.values]


def _label(summary: Summary, summaries: Sequence[Summary]) -> str:
    same = [other for other in summaries if other.variant == summary.variant]
    return f"{summary.variant}, {summary.point}" if len(same) > 1 else summary.variant


def _words(metric: str) -> str:
    return metric.replace("heldout_", "held-out ").replace("_", " ").replace("/", ", ")


def _cycle() -> Iterator[str]:
    return itertools.cycle(_COLORS)
