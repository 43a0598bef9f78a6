r"""Draws training speed against context length, from a file of `megalodon bench train`.

    megalodon bench train --preset mega200M --against transformer --tokens 32768 \
        --length 2048 4096 8192 16384 32768 65536 131072 --remat none inputs dots block \
        --json docs/results/context_length.json
    python docs/plot_context_length.py     # writes docs/results/context_length.svg

Needs only the standard library. The same measurements always give the same bytes.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

RESULTS = Path(__file__).resolve().parent / "results"

# A page on a phone is about 360 pixels wide: letters of 24 units then have 13 pixels.
WIDTH, HEIGHT = 640, 496
LEFT, RIGHT, TOP, BOTTOM = 84, 604, 148, 400
MARGIN = 20
# Style classes of the curves, in the order of the file.
CLASSES = ("first", "second")

# The picture has its own background, and so does not depend on the page's.
STYLE = """
  text { font-family: system-ui, "Segoe UI", Roboto, sans-serif; font-size: 24px; fill: #57606a }
  .title { font-weight: 600; font-size: 29px; fill: #1f2328 }
  .value { fill: #1f2328 }
  .background { fill: #ffffff }
  .grid { stroke: #d8dee4; stroke-width: 1.5 }
  .axis { stroke: #8c959f; stroke-width: 2 }
  .line { stroke-width: 4; stroke-linejoin: round }
  .line.first { stroke: #0969da }
  .line.second { stroke: #bc4c00 }
  .first { fill: #0969da }
  .second { fill: #bc4c00 }
  .line { fill: none }
  @media (prefers-color-scheme: dark) {
    text { fill: #9da7b3 }
    .title, .value { fill: #f0f6fc }
    .background { fill: #0d1117 }
    .grid { stroke: #2b333c }
    .axis { stroke: #6e7681 }
    .line.first { stroke: #4493f8 }
    .line.second { stroke: #f0883e }
    .first { fill: #4493f8 }
    .second { fill: #f0883e }
    .line { fill: none }
  }
"""


class SpeedPoint(NamedTuple):
    """The speed at one context length; `tokens_per_second` is None if the step did not fit."""

    rows: int
    length: int
    remat: str
    tokens_per_second: float | None


class SpeedCurve(NamedTuple):
    """The measurements of one model on one device, by increasing context length."""

    device: str
    preset: str
    points: list[SpeedPoint]

    @property
    def measured(self) -> list[SpeedPoint]:
        """The points whose steps fit."""
        return [point for point in self.points if point.tokens_per_second is not None]


def read_curves(text: str) -> list[SpeedCurve]:
    """Reads the JSON of `megalodon bench train`: one curve a model, at most two.

    Raises:
      ValueError: the file mixes packed and plain rows or lengths, or a model was not measured.
    """
    report = json.loads(text)
    points: dict[str, list[SpeedPoint]] = {}
    for step in report["steps"]:
        case = step["case"]
        point = SpeedPoint(
            case["rows"], case["length"], case["remat"], step.get("tokens_per_second")
        )
        points.setdefault(case["preset"], []).append(point)
    documents = {step["case"]["documents"] for step in report["steps"]}
    if len(documents) != 1 or len(points) > len(CLASSES):
        raise ValueError(
            f"at most two models with rows of one kind are needed, got {', '.join(points)} with "
            f"{sorted(documents)} documents a row; measure them separately"
        )
    curves = [
        SpeedCurve(report["device"], preset, sorted(own, key=lambda point: point.length))
        for preset, own in points.items()
    ]
    for curve in curves:
        if not curve.measured:
            raise ValueError(f"no step of {curve.preset} fitted; see the reasons in the file")
    lengths = {tuple(point.length for point in curve.points) for curve in curves}
    if len(lengths) != 1:
        raise ValueError(f"the models have different lengths: {sorted(lengths)}")
    return curves


def draw(curves: list[SpeedCurve]) -> str:
    """The curves as SVG: a logarithmic axis of lengths, an axis of tokens/s that begins at zero."""
    measured = [point for curve in curves for point in curve.measured]
    step, top = speed_ticks(max(point.tokens_per_second or 0.0 for point in measured))
    lengths = [point.length for point in curves[0].points]
    body = [_rect(), _text(MARGIN, 48, "Training speed by context length", "title", anchor="start")]
    body.append(_names(curves))
    body.append(_text(MARGIN, 112, _batches(curves), anchor="start"))
    for index in range(round(top / step) + 1):
        y = _y(index * step, top)
        body.append(_line(LEFT, y, RIGHT, y, "grid" if index else "axis"))
        body.append(_text(LEFT - 10, y + 8, short_number(index * step, 1000, "k"), anchor="end"))
    for length in lengths:
        x = _x(length, lengths)
        body.append(_line(x, BOTTOM, x, BOTTOM + 8, "axis"))
        body.append(_text(x, BOTTOM + 36, short_number(length, 1024, "K")))
    body.append(_text((LEFT + RIGHT) / 2, HEIGHT - 22, "context length, tokens"))
    for curve, style in zip(curves, CLASSES, strict=False):
        others = [point for other in curves if other is not curve for point in other.measured]
        body += _curve(curve, others, lengths, top, style)
    return _document(describe(curves), body)


def _curve(
    curve: SpeedCurve, others: list[SpeedPoint], lengths: list[int], top: float, style: str
) -> list[str]:
    positions = [
        (_x(point.length, lengths), _y(point.tokens_per_second or 0.0, top))
        for point in curve.measured
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in positions)
    body = [f'<polyline class="line {style}" points="{path}"/>']
    for (x, y), point in zip(positions, curve.measured, strict=True):
        body.append(f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="6.5"/>')
        value = short_number(float(f"{point.tokens_per_second:.3g}"), 1000, "k")
        # The label of the slower model is below its point, if there is room above the axis.
        is_slower = any(
            other.length == point.length
            and (other.tokens_per_second or 0.0) > (point.tokens_per_second or 0.0)
            for other in others
        )
        below = is_slower and y + 34 < BOTTOM - 20
        body.append(_text(x, y + 34 if below else y - 16, value, "value"))
    return body


def _names(curves: list[SpeedCurve]) -> str:
    """The line under the title: the models in their curves' colors, and the hardware."""
    names = "".join(
        f'<tspan class="{style}">{escape(curve.preset)}</tspan>, '
        for curve, style in zip(curves, CLASSES, strict=False)
    )
    return f'<text x="{MARGIN}" y="82">{names}one {escape(_device(curves))}</text>'


def _device(curves: list[SpeedCurve]) -> str:
    """Short name of the device: "NVIDIA H100 80GB HBM3" is "H100"."""
    return curves[0].device.removeprefix("NVIDIA ").removesuffix(" HBM3").removesuffix(" 80GB")


def _batches(curves: list[SpeedCurve]) -> str:
    points = [point for curve in curves for point in curve.points]
    batch = min(point.rows * point.length for point in points)
    longer = any(point.length > batch for point in points)
    tokens = short_number(batch, 1024, "K")
    # One row of the longest contexts has more tokens than the other batches.
    return f"Tokens/s; {tokens} tokens a batch" + (f", larger above {tokens}" if longer else "")


def describe(curves: list[SpeedCurve]) -> str:
    """All numbers as text, for readers who do not see the picture."""
    texts = []
    for curve in curves:
        values = [_described(point) for point in curve.points]
        texts.append(f"{curve.preset}: {'; '.join(values)}")
    return (
        f"{_batches(curves)}, one {_device(curves)}. Tokens/s by context length. "
        f"{'. '.join(texts)}."
    )


def _described(point: SpeedPoint) -> str:
    if point.tokens_per_second is None:
        return f"{point.length:,}: out of memory"
    remat = "" if point.remat == "none" else f" (remat {point.remat})"
    return f"{point.length:,}: {point.tokens_per_second:,.0f}{remat}"


def speed_ticks(highest: float) -> tuple[float, float]:
    """The distance of ticks and the end of the axis, not below `highest`: 3 to 5 ticks."""
    decade = 10.0 ** math.floor(math.log10(highest))
    step = next(decade * factor for factor in (0.5, 1, 2, 5) if highest <= 4 * decade * factor)
    return step, step * math.ceil(highest / step)


def short_number(value: float, unit: int, suffix: str) -> str:
    """The number in units of `unit` if it is a round one: 2048 is 2K, 300,000 is 300k."""
    quotient = value / unit
    if value == 0 or quotient < 1 or quotient != round(quotient, 1):
        return f"{value:,.0f}"
    return f"{quotient:,g}{suffix}"


def _x(length: int, lengths: list[int]) -> float:
    low, high = math.log2(min(lengths)), math.log2(max(lengths))
    share = (math.log2(length) - low) / (high - low) if high > low else 0.5
    inset = 32
    return LEFT + inset + share * (RIGHT - LEFT - 2 * inset)


def _y(speed: float, top: float) -> float:
    return BOTTOM - speed / top * (BOTTOM - TOP)


def _text(x: float, y: float, text: str, style: str = "", anchor: str = "middle") -> str:
    of_class = f' class="{style}"' if style else ""
    return f'<text{of_class} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _rect() -> str:
    return f'<rect class="background" width="{WIDTH}" height="{HEIGHT}" rx="12"/>'


def _document(description: str, body: list[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
    title = "<title>Training speed by context length</title>"
    elements = [
        head,
        title,
        f"<desc>{escape(description)}</desc>",
        f"<style>{STYLE}</style>",
        *body,
    ]
    return "\n".join([*elements, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws training speed against context length.")
    parser.add_argument("--json", type=Path, default=RESULTS / "context_length.json")
    parser.add_argument("--svg", type=Path, default=RESULTS / "context_length.svg")
    options: Any = parser.parse_args()
    options.svg.write_text(draw(read_curves(options.json.read_text())), encoding="utf-8")


if __name__ == "__main__":
    main()
