"""docs/plot_decode_context.py: the curves show the measurements, on logarithmic axes."""

import json
import runpy
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
CONTEXTS = (4096, 32_768, 1_048_576)
# Rows that fit and seconds of a step, by model.
MEASURED = {
    "mega200M": [(600, 3e-4)] * 3,
    "transformer200M": [(400, 1e-3), (50, 1e-2), (1, None)],
}


@pytest.fixture(scope="module")
def plot():
    # As for a script, whose folder is searched first.
    sys.path.insert(0, str(DOCS))
    try:
        return runpy.run_path(str(DOCS / "plot_decode_context.py"))
    finally:
        sys.path.remove(str(DOCS))


def report(**changes) -> str:
    """The JSON of `megalodon bench decode`; a step without seconds did not fit."""
    rows = [
        {
            "context": context,
            "row_bytes": 1,
            "rows_that_fit": rows,
            "step": {"model": model, "batch": batch, "seconds": seconds},
        }
        for model, measured in MEASURED.items()
        for batch in (1, 64)
        for context, (rows, seconds) in zip(CONTEXTS, measured, strict=True)
    ]
    return json.dumps({"device": "NVIDIA H100 80GB HBM3", "contexts": rows} | changes)


def elements(svg: str, name: str) -> list[ElementTree.Element]:
    return ElementTree.fromstring(svg).findall(f"{{http://www.w3.org/2000/svg}}{name}")


def test_points_are_measurements_on_logarithmic_axes(plot):
    svg = plot["draw"](plot["read_curves"](report()))
    heights = {
        style: [float(c.get("cy")) for c in elements(svg, "circle") if c.get("class") == style]
        for style in ("first", "second")
    }
    # Three points of rows and three or two of times: what was not measured is not drawn.
    assert [len(own) for own in heights.values()] == [6, 5]
    assert len(set(heights["first"][:3])) == len(set(heights["first"][3:])) == 1
    (top, bottom), (top_2, bottom_2) = plot["PANELS"]
    decade, decade_2 = (bottom - top) / 3, (bottom_2 - top_2) / 2
    rows, times = heights["second"][:3], heights["second"][3:]
    assert rows[2] == pytest.approx(bottom, abs=0.1)
    # 400 is 2.6 decades above 1 on an axis from 1 to 1,000.
    assert bottom - rows[0] == pytest.approx(2.602 * decade, abs=0.1)
    # 1 ms and 10 ms are a decade apart on an axis from 0.1 to 10.
    assert times[0] - times[1] == pytest.approx(decade_2, abs=0.1)
    assert times[1] == pytest.approx(top_2, abs=0.1)


def test_names_models_hardware_and_all_numbers(plot):
    svg = plot["draw"](plot["read_curves"](report()))
    texts = ["".join(text.itertext()) for text in elements(svg, "text")]
    assert {"mega200M", "transformer200M", "one H100", "4K", "32K", "1M"} <= set(texts)
    assert "Milliseconds a step of 1 row" in texts
    (description,) = elements(svg, "desc")
    assert "1,048,576: 1 rows, not measured" in description.text
    assert "4,096: 600 rows, 0.3 ms" in description.text


@pytest.mark.parametrize(
    ("lowest", "highest", "ticks"),
    [(1, 1, [1, 10]), (0.2, 40, [0.1, 1, 10, 100]), (3, 2e6, [1, 100, 1e4, 1e6, 1e8])],
)
def test_ticks_are_powers_of_ten_around_the_values(plot, lowest, highest, ticks):
    assert plot["log_ticks"](lowest, highest) == pytest.approx(ticks)


def test_measurements_that_do_not_compare_are_refused(plot):
    with pytest.raises(ValueError, match="no contexts; measure with --against transformer"):
        plot["read_curves"](report(contexts=[]))
    with pytest.raises(ValueError, match="models with contexts"):
        plot["read_curves"](report(contexts=json.loads(report())["contexts"][:-4]))
