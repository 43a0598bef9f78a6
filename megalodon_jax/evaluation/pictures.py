"""Pictures of a classification as SVG: the learning curve and the confusion matrix.

Needs only the standard library and NumPy; the same numbers always give the same bytes.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np

_STYLE = """
  text { font-family: system-ui, "Segoe UI", Roboto, sans-serif; font-size: 15px; fill: #57606a }
  .title { font-size: 19px; font-weight: 600; fill: #1f2328 }
  .background { fill: #ffffff }
  .grid { stroke: #d8dee4 }
  .line { fill: none; stroke-width: 2.5 }
  .c0 { stroke: #0969da } .c1 { stroke: #bc4c00 } .c2 { stroke: #1a7f37 }
  .f0 { fill: #0969da } .f1 { fill: #bc4c00 } .f2 { fill: #1a7f37 }
"""
_WIDTH, _HEIGHT = 640, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 620, 70, 350
# More cells than that carry no numbers: they would not be legible.
_MOST_LABELLED = 24

Series = Sequence[tuple[float, float]]


def read_series(metrics: Path, names: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
    """Steps and finite values of some metrics in a run's `metrics.jsonl`.

    A resumed run may have a step twice; the later line counts.
    """
    found: dict[str, dict[float, float]] = {name: {} for name in names}
    for line in metrics.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for name in names:
            value = record.get(name)
            if isinstance(value, int | float) and math.isfinite(value):
                found[name][record["step"]] = value
    return {name: sorted(points.items()) for name, points in found.items() if points}


def learning_curve(series: Mapping[str, Series], *, title: str) -> str:
    """Lines of values between 0 and 1 (accuracies) over the steps of a run."""
    last = max((step for points in series.values() for step, _ in points), default=1)
    parts = [_text(_LEFT, 36, title, "title")]
    for tick in range(6):
        y = _BOTTOM - (_BOTTOM - _TOP) * tick / 5
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{y:g}" y2="{y:g}"/>')
        parts.append(_text(_LEFT - 8, y + 5, f"{tick * 20} %", anchor="end"))
    for tick in range(5):
        x = _LEFT + (_RIGHT - _LEFT) * tick / 4
        parts.append(_text(x, _BOTTOM + 22, f"{round(last * tick / 4):,}", anchor="middle"))
    parts.append(_text((_LEFT + _RIGHT) / 2, _BOTTOM + 44, "updates", anchor="middle"))
    for number, (name, points) in enumerate(series.items()):
        places = " ".join(
            f"{_LEFT + (_RIGHT - _LEFT) * step / last:.1f},{_BOTTOM - (_BOTTOM - _TOP) * value:.1f}"
            for step, value in points
        )
        color = number % 3
        parts.append(f'<polyline class="line c{color}" points="{places}"/>')
        label = f"{name.replace('_', ' ')}: {points[-1][1]:.1%} at the end"
        parts.append(_text(_LEFT + 270 * number, 58, label, f"f{color}"))
    return _document(_WIDTH, _HEIGHT, parts)


def confusion_matrix(counts: np.ndarray, names: Sequence[str], *, title: str) -> str:
    """Counts of examples by class (rows) and answer (columns); colors are shares of the rows."""
    K = len(counts)
    names = [*names, *map(str, range(len(names), K))][:K]
    cell = max(8, min(48, 560 // K))
    left, top = 20 + 8 * max(len(name) for name in names), 90
    parts = [_text(20, 36, title, "title"), _text(left, 60, "columns: answer; rows: class")]
    is_labelled = K <= _MOST_LABELLED
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    for row in range(K):
        y = top + row * cell
        if is_labelled:
            parts.append(_text(left - 8, y + cell / 2 + 5, names[row], anchor="end"))
        for column in range(K):
            x, share = left + column * cell, float(shares[row, column])
            color = "9,105,218" if row == column else "188,76,0"
            parts.append(
                f'<rect x="{x}" y="{y}" width="{cell}" height="{cell}" '
                f'fill="rgba({color},{share:.3f})" class="cell"/>'
            )
            if is_labelled and counts[row, column]:
                shown = f"{int(counts[row, column])}"
                parts.append(_text(x + cell / 2, y + cell / 2 + 5, shown, anchor="middle"))
    return _document(left + K * cell + 20, top + K * cell + 20, parts)


def _text(x: float, y: float, text: str, style: str = "", *, anchor: str = "start") -> str:
    kind = f' class="{style}"' if style else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{kind}>{escape(text)}</text>'


def _document(width: int, height: int, parts: Sequence[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}">\n<style>{_STYLE}</style>\n'
        f'<rect class="background" width="{width}" height="{height}"/>\n{body}\n</svg>\n'
    )
