"""Results that the documentation shows, and the scripts beside them."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from megalodon_jax.study.definition import read_study, stage_runs
from megalodon_jax.study.report import results_markdown
from megalodon_jax.study.results import read_results
from megalodon_jax.typing import Batch

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
STUDIES = ["ablations_30M", "head_to_head_30M"]


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, RESULTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", STUDIES)
def test_results_are_of_the_runs_that_the_study_defines(name: str):
    study = read_study(ROOT / "configs" / "studies" / f"{name}.toml")
    results = read_results(RESULTS / f"{name}.json")
    defined = [run for stage in study.stages if not stage.best_of
               for run in stage_runs(study, stage, None)]  # fmt: skip
    found = [result for result in results.runs if result.stage == defined[0].stage]
    assert found
    for result in found:
        assert result.table in [run.table for run in defined], result.variant


def test_differences_are_between_equal_points_of_the_grid():
    table = results_markdown(read_results(RESULTS / "head_to_head_30M.json"))
    assert "| transformer | optim.lr 0.002 | 1 | 2.0097 |  | -0.0747 |" in table
    assert "| transformer | optim.lr 0.004 | 1 | 2.1714 |  | +0.0981 |" in table
    assert "| megalodon | optim.lr 0.004 | 1 | 2.0733 |  |  |" in table


def test_a_change_of_the_text_is_a_jump_of_its_loss():
    rng = np.random.default_rng(0)
    letters, others = np.arange(97, 101), np.arange(180, 250)
    text = [rng.choice(letters, (3, 201)) for _ in range(12)]
    text += [rng.choice(others, (3, 201)) for _ in range(3)]
    batches = [Batch(t, t, t, np.ones(t.shape, np.float32)) for t in text]
    losses = load_script("batch_entropy").batch_losses(iter(batches), steps=15)
    # Four equally probable letters; then bytes that were never seen.
    assert losses[11] == pytest.approx(np.log(4), abs=0.05)
    assert losses[12] > 4
    assert len(losses) == 15
