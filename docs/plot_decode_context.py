r"""Draws decoding against context length, from a file of `megalodon bench decode`.

    megalodon bench decode --preset mega200M --part context --against transformer \
        --json docs/results/decode_context.json
    python docs/plot_decode_context.py     # writes docs/results/decode_context.svg

Needs only the standard library. The same measurements always give the same bytes.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from plot_context_length import LEFT, MARGIN, RESULTS, RIGHT, STYLE, WIDTH, short_number

HEIGHT = 812
# Top and bottom of the two panels.
PANELS = ((216, 406), (546, 736))
TITLE = "Decoding by context length"
CLASSES = ("first", "second", "third")
THIRD_STYLE = """
  .line.third { stroke: #1a7f37 }
  .third { fill: #1a7f37 }
  .line { fill: none }
  @media (prefers-color-scheme: dark) {
    .line.third { stroke: #3fb950 }
    .third { fill: #3fb950 }
    .line { fill: none }
  }
"""


class DecodePoint(NamedTuple):
    """One model after one context; None where nothing was measured, or is known.

    Attributes:
      context: tokens.
      rows: rows whose caches fit the device beside the weights.
      milliseconds: of a step.
    """

    context: int
    rows: int | None
    milliseconds: float | None


class DecodeCurve(NamedTuple):
    """One model on one device, by increasing context."""

    device: str
    model: str
    batch: int
    points: list[DecodePoint]


def read_curves(text: str) -> list[DecodeCurve]:
    """Reads the JSON of `megalodon bench decode`: a curve a model, of its smallest batch.

    Raises:
      ValueError: there are no contexts, or the models have different ones.
    """
    report = json.loads(text)
    rows = report["contexts"]
    if not rows:
        raise ValueError("the file has no contexts; measure with --against transformer")
    batch = min(row["step"]["batch"] for row in rows)
    points: dict[str, list[DecodePoint]] = {}
    for row in rows:
        step = row["step"]
        if step["batch"] == batch:
            seconds = step["seconds"]
            points.setdefault(step["model"], []).append(
                DecodePoint(
                    row["context"],
                    row["rows_that_fit"],
                    None if seconds is None else 1e3 * seconds,
                )
            )
    curves = [
        DecodeCurve(report["device"], model, batch, sorted(own)) for model, own in points.items()
    ]
    contexts = {tuple(point.context for point in curve.points) for curve in curves}
    if len(contexts) != 1 or len(curves) > len(CLASSES):
        raise ValueError(
            f"{len(curves)} models with contexts {sorted(contexts)}; at most {len(CLASSES)} models "
            "with the same contexts are drawn"
        )
    return curves


def draw(curves: list[DecodeCurve]) -> str:
    """Two panels with logarithmic axes: rows that fit the device, and the time of a step."""
    body = [
        f'<rect class="background" width="{WIDTH}" height="{HEIGHT}" rx="12"/>',
        _text(MARGIN, 48, TITLE, "title", anchor="start"),
        _text(RIGHT, 82, f"one {_device(curves)}", anchor="end"),
    ]
    for i, (curve, style) in enumerate(zip(curves, CLASSES, strict=False)):
        body.append(_text(MARGIN, 82 + 30 * i, curve.model, style, anchor="start"))
    plural = "row" if curves[0].batch == 1 else "rows"
    panels = {
        "Rows whose caches fit beside the weights": [
            [(point.context, point.rows) for point in curve.points] for curve in curves
        ],
        f"Milliseconds a step of {curves[0].batch} {plural}": [
            [(point.context, point.milliseconds) for point in curve.points] for curve in curves
        ],
    }
    for (heading, series), (top, bottom) in zip(panels.items(), PANELS, strict=True):
        body += _panel(heading, series, top, bottom)
    body.append(_text((LEFT + RIGHT) / 2, HEIGHT - 12, "context length, tokens"))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
            f"<title>{TITLE}</title>",
            f"<desc>{escape(describe(curves))}</desc>",
            f"<style>{STYLE}{THIRD_STYLE}</style>",
            *body,
            "</svg>\n",
        ]
    )


def _panel(
    heading: str, series: list[list[tuple[int, float | None]]], top: float, bottom: float
) -> list[str]:
    """One panel; a curve's values that are None or 0 are left out."""
    contexts = [context for context, _ in series[0]]
    values = [value for own in series for _, value in own if value]
    body = [_text(MARGIN, top - 20, heading, anchor="start")]
    if not values:
        return [*body, _text((LEFT + RIGHT) / 2, (top + bottom) / 2, "not measured")]
    decades = log_ticks(min(values), max(values))
    low, high = math.log10(decades[0]), math.log10(decades[-1])

    def height(value: float) -> float:
        return bottom - (math.log10(value) - low) / (high - low) * (bottom - top)

    for tick in decades:
        y = height(tick)
        body.append(_line(LEFT, y, RIGHT, y, "axis" if tick == decades[0] else "grid"))
        body.append(_text(LEFT - 10, y + 8, _tick(tick), anchor="end"))
    for context in contexts:
        x = _x(context, contexts)
        body.append(_line(x, bottom, x, bottom + 8, "axis"))
        body.append(_text(x, bottom + 34, _tokens(context)))
    for own, style in zip(series, CLASSES, strict=False):
        positions = [(_x(at, contexts), height(value)) for at, value in own if value]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in positions)
        body.append(f'<polyline class="line {style}" points="{path}"/>')
        body += [
            f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="6.5"/>' for x, y in positions
        ]
    return body


def log_ticks(lowest: float, highest: float) -> list[float]:
    """Powers of ten around all values, at least two, in steps that leave at most five."""
    first = math.floor(math.log10(lowest))
    last = max(first + 1, math.ceil(math.log10(highest)))
    step = math.ceil((last - first) / 4)
    last = first + step * math.ceil((last - first) / step)
    return [10.0**exponent for exponent in range(first, last + 1, step)]


def describe(curves: list[DecodeCurve]) -> str:
    """All numbers as text, for readers who do not see the picture."""
    texts = []
    for curve in curves:
        values = "; ".join(map(_described, curve.points))
        texts.append(f"{curve.model}: {values}")
    return (
        f"One {_device(curves)}, steps of {curves[0].batch} rows. By context length: rows whose "
        f"caches fit, time of a step. {'. '.join(texts)}."
    )


def _described(point: DecodePoint) -> str:
    rows = "unknown" if point.rows is None else f"{point.rows:,} rows"
    milliseconds = point.milliseconds
    time = "not measured" if milliseconds is None else f"{milliseconds:.3g} ms"
    return f"{point.context:,}: {rows}, {time}"


def _tokens(count: int) -> str:
    million = 1024**2
    is_million = count >= million and not count % million
    return f"{count // million}M" if is_million else short_number(count, 1024, "K")


def _tick(value: float) -> str:
    return short_number(value, 1000, "k") if value >= 1 else f"{value:g}"


def _device(curves: list[DecodeCurve]) -> str:
    return curves[0].device.removeprefix("NVIDIA ").removesuffix(" HBM3").removesuffix(" 80GB")


def _x(context: int, contexts: list[int]) -> float:
    low, high = math.log2(min(contexts)), math.log2(max(contexts))
    share = (math.log2(context) - low) / (high - low) if high > low else 0.5
    inset = 32
    return LEFT + inset + share * (RIGHT - LEFT - 2 * inset)


def _text(x: float, y: float, text: str, style: str = "", anchor: str = "middle") -> str:
    of_class = f' class="{style}"' if style else ""
    return f'<text{of_class} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws decoding against context length.")
    parser.add_argument("--json", type=Path, default=RESULTS / "decode_context.json")
    parser.add_argument("--svg", type=Path, default=RESULTS / "decode_context.svg")
    options: Any = parser.parse_args()
    options.svg.write_text(draw(read_curves(options.json.read_text())), encoding="utf-8")


if __name__ == "__main__":
    main()
