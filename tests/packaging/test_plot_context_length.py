"""docs/plot_context_length.py: the curves show the measurements, on axes that do not exaggerate."""

import json
import runpy
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
PLOT = runpy.run_path(str(DOCS / "plot_context_length.py"))
SPEEDS = {2048: 100_000.0, 8192: 200_000.0, 32_768: 150_000.0, 131_072: None}


def report(speeds=None, **case) -> str:
    """The JSON of `megalodon bench train`; a step without a speed did not fit."""
    steps = []
    for length, speed in (SPEEDS if speeds is None else speeds).items():
        kind = {"preset": "mega200M", "remat": "none", "documents": 0, **case}
        step: dict = {"case": {"rows": max(1, 32_768 // length), "length": length, **kind}}
        steps.append(step | ({"reason": "OOM"} if speed is None else {"tokens_per_second": speed}))
    return json.dumps({"device": "NVIDIA H100 80GB HBM3", "matmul": 1.0, "steps": steps})


def elements(svg: str, name: str) -> list[ElementTree.Element]:
    return ElementTree.fromstring(svg).findall(f"{{http://www.w3.org/2000/svg}}{name}")


def test_points_are_measurements_on_a_log_axis_and_a_zero_based_axis():
    svg = PLOT["draw"](PLOT["read_curves"](report()))
    circles = elements(svg, "circle")
    x = [float(circle.get("cx")) for circle in circles]
    y = [float(circle.get("cy")) for circle in circles]
    axis = {
        text.text: float(text.get("y")) - 8
        for text in elements(svg, "text")
        if text.get("text-anchor") == "end"
    }
    heights = [axis["0"] - value for value in y]
    assert heights[1] / heights[0] == pytest.approx(2.0, rel=1e-2)
    assert heights[2] / heights[0] == pytest.approx(1.5, rel=1e-2)
    assert y[0] == pytest.approx(axis["100k"], abs=0.1)
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)


def test_names_the_model_the_hardware_and_lengths_that_did_not_fit():
    svg = PLOT["draw"](PLOT["read_curves"](report()))
    texts = ["".join(text.itertext()) for text in elements(svg, "text")]
    assert "mega200M, one H100" in texts
    assert "Tokens/s; 32K tokens a batch, larger above 32K" in texts
    assert {"2K", "8K", "32K", "128K"} <= set(texts)
    assert "131,072: out of memory" in elements(svg, "desc")[0].text


def test_two_models_are_two_curves_on_the_same_axes():
    mixed = json.loads(report())
    slower = {length: speed and speed / 2 for length, speed in SPEEDS.items()}
    other = json.loads(report(slower, preset="transformer200M", remat="dots"))
    # The benchmark measures both models at one length before the next.
    mixed["steps"] = [
        step for pair in zip(mixed["steps"], other["steps"], strict=True) for step in pair
    ]
    curves = PLOT["read_curves"](json.dumps(mixed))
    assert [curve.preset for curve in curves] == ["mega200M", "transformer200M"]
    svg = PLOT["draw"](curves)
    heights = {
        style: [
            400 - float(circle.get("cy"))
            for circle in elements(svg, "circle")
            if circle.get("class") == style
        ]
        for style in ("first", "second")
    }
    assert heights["second"] == pytest.approx([h / 2 for h in heights["first"]], abs=0.1)
    names = ["".join(text.itertext()) for text in elements(svg, "text")]
    assert "mega200M, transformer200M, one H100" in names
    assert "2,048: 50,000 (remat dots)" in elements(svg, "desc")[0].text


@pytest.mark.parametrize("highest", [1.0, 9.9, 317_000.0, 400_000.0, 58_123.0])
def test_axis_ends_above_the_highest_point(highest):
    step, top = PLOT["speed_ticks"](highest)
    assert highest <= top < highest + step
    assert 2 <= round(top / step) <= 4


def test_measurements_that_do_not_compare_are_refused():
    packed = json.loads(report())
    packed["steps"] += json.loads(report(preset="transformer200M", documents=8))["steps"]
    with pytest.raises(ValueError, match="rows of one kind"):
        PLOT["read_curves"](json.dumps(packed))
    shorter = json.loads(report())
    shorter["steps"] += json.loads(report({2048: 1.0}, preset="transformer200M"))["steps"]
    with pytest.raises(ValueError, match="different lengths"):
        PLOT["read_curves"](json.dumps(shorter))
    with pytest.raises(ValueError, match="no step of mega200M"):
        PLOT["read_curves"](report({2048: None}))


@pytest.mark.skipif(
    not (DOCS / "results" / "context_length.json").exists(), reason="nothing has been measured yet"
)
def test_committed_picture_shows_the_committed_measurements():
    measured = (DOCS / "results" / "context_length.json").read_text()
    committed = (DOCS / "results" / "context_length.svg").read_text(encoding="utf-8")
    assert committed == PLOT["draw"](PLOT["read_curves"](measured))
