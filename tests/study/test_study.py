"""Studies: real training processes, a failing variant, a stop and its continuation, the report."""

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from megalodon_jax.cli.main import main
from megalodon_jax.errors import ConfigError
from megalodon_jax.study import (
    RunResult,
    Stage,
    Study,
    StudyResults,
    Variant,
    read_results,
    read_study,
    run_study,
    stage_runs,
)
from megalodon_jax.study.plots import draw_results
from megalodon_jax.study.report import results_markdown, summarize_runs
from megalodon_jax.study.results import CurvePoint, read_run, write_result, write_results
from megalodon_jax.study.schedule import best_points
from megalodon_jax.study.toml_text import to_toml
from tests.fixtures_runs import TINY_TABLES

METRIC = "heldout_bits_per_byte/books"


def _run(variant: str, seed: int, final: float, **values) -> RunResult:
    heldout = tuple(
        CurvePoint(step, 100.0 * step, 0.5 * step, {METRIC: final + 1 / step}) for step in (1, 5, 9)
    )
    return RunResult(
        stage="final", variant=variant, point={}, seed=seed, table={}, status="done",
        final={METRIC: final, "loss": final}, heldout=heldout, parameters=12_345, tokens=900.0,
        seconds=4.5, tokens_per_second=200.0, **values,
    )  # fmt: skip


def _contexts(perplexities: list[float]) -> dict:
    rows = [{"context": 4**i, "perplexity": p} for i, p in enumerate(perplexities, 1)]
    return {"context": {"task": "perplexity_by_context", "results": rows}}


@pytest.fixture
def results() -> StudyResults:
    failed = RunResult(
        stage="final", variant="c", point={}, seed=0, table={}, status="failed", exit_code=1,
        error="out of memory\nagain",
    )  # fmt: skip
    runs = (
        _run("a", 0, 2.0, evaluations=_contexts([4.0, 3.0])),
        _run("b", 0, 2.5, evaluations=_contexts([5.0, 5.0])),
        _run("a", 1, 2.2, evaluations=_contexts([4.2, 3.2])),
        _run("b", 1, 2.4, evaluations=_contexts([5.0, 5.2])),
        failed,
    )
    return StudyResults("tiny", "Tiny", METRIC, runs)


def test_means_and_deviations_over_seeds(results):
    a, b, c = summarize_runs(results)
    assert (a.variant, b.variant, c.variant) == ("a", "b", "c")
    assert a.mean == pytest.approx(2.1)
    assert a.deviation == pytest.approx(np.std([2.0, 2.2], ddof=1))
    assert (len(c.runs), c.num_failed) == (0, 1)


def test_the_table_has_every_run_failed_ones_too(results):
    text = results_markdown(results)
    assert "| b |  | 2 | 2.4500 | 0.0707 | +0.3500 | 12,345 |" in text
    assert "| c |  | 0 (1 failed) |" in text
    assert "failed with exit code 1: out of memory again" in text
    assert text.count("| final a seed") == 2


@pytest.mark.slow
def test_pictures_have_every_variant_and_the_same_bytes(results, tmp_path):
    files = draw_results(results, tmp_path / "once")
    assert [path.name for path in files] == [
        "tiny_tokens.svg", "tiny_seconds.svg", "tiny_final.svg", "tiny_context.svg",
    ]  # fmt: skip
    for path in files:
        text = path.read_text()
        assert ">a<" in text
        assert ">b<" in text
        assert ">c<" not in text
    again = draw_results(results, tmp_path / "again")
    assert [p.read_bytes() for p in files] == [p.read_bytes() for p in again]
    nothing = results._replace(runs=results.runs[-1:])
    with pytest.raises(ConfigError, match="no run of tiny is done"):
        draw_results(nothing, tmp_path)


def test_the_best_point_of_an_accuracy_is_the_highest():
    stages = (Stage(name="rates"), Stage(name="final", best_of="rates"))
    runs = [
        _run("a", 0, accuracy)._replace(stage="rates", point={"optim.lr": rate})
        for rate, accuracy in ((1e-3, 0.4), (1e-2, 0.7), (1e-1, 0.5))
    ]
    for mode, rate in (("max", 1e-2), ("min", 1e-3)):
        study = Study(
            name="tiny", title="Tiny", metric=METRIC, mode=mode, run={}, stages=stages,
            variants=(Variant(name="a"),),
        )  # fmt: skip
        assert best_points(study, stages[1], runs) == {"a": {"optim.lr": rate}}


def test_the_table_of_accuracies(results, tmp_path):
    test = {"test": {"task": "examples", "results": [{"accuracy": 0.625}]}}
    runs = (results.runs[0]._replace(evaluations=test), *results.runs[1:])
    found = results._replace(runs=runs, mode="max")
    text = results_markdown(found)
    assert f"`{METRIC}`, higher is better." in text
    assert f"| run | status | {METRIC} | test accuracy | training loss |" in text
    assert "| final a seed 0 | done | 2.0000 | 0.6250 |" in text
    # The mode is part of the file; a file of an older version has a loss.
    study = Study(
        name="tiny", title="Tiny", metric=METRIC, mode="max", run={}, variants=(), stages=()
    )
    write_results(tmp_path, study, runs)
    path = tmp_path / "results.json"
    assert read_results(path).mode == "max"
    path.write_text(path.read_text().replace('"mode": "max",', ""))
    assert read_results(path).mode == "min"


STUDY = """
name = "tiny"
metric = "heldout_bits_per_byte"
[run]
steps = 4
log_every = 1
eval_every = 2
eval_batches = 2
final_eval_batches = 2
checkpoint_every = 1
sample_tokens = 0
loss_chunk_size = 64
{tables}
[[variants]]
name = "base"
[[variants]]
name = "broken"
settings.data.files = ["{missing}"]
[[stages]]
name = "rates"
grid."optim.lr" = [1e-2]
[[stages]]
name = "final"
best_of = "rates"
seeds = [3]
evaluate = true
settings.steps = 6
[[stages]]
name = "tuned"
init_from = "final"
seeds = [3]
evaluate = true
settings.task = "sft"
settings.steps = 2
settings.data.files = ["{examples}"]
settings.data.heldout_files = []
settings.data.heldout_fraction = 0.2
[[examples]]
name = "sums"
arguments = ["addition", "--out", "{examples}", "--count", "40", "--digits", "1", "2"]
[[evaluations]]
name = "sums"
stages = ["tuned"]
arguments = ["--task", "addition", "--digits", "1", "3", "--count", "8"]
[[evaluations]]
name = "no_such_file"
stages = ["final"]
arguments = ["--files", "{missing}"]
"""


@pytest.fixture
def study_file(tmp_path, text_file) -> Path:
    tables = "\n".join(
        f"[run.{line[1:]}" if line.startswith("[") else line
        for line in TINY_TABLES.format(text_file=text_file, lr=1e-3).splitlines()
    )
    path = tmp_path / "study.toml"
    path.write_text(
        STUDY.format(
            tables=tables,
            missing=tmp_path / "missing.txt",
            examples=tmp_path / "data/sums.jsonl",
        )
    )
    return path


def test_a_start_of_which_only_the_result_is_there_runs_again(study_file, tmp_path, monkeypatch):
    ran = []

    def run_one(pool, run, _environment):
        ran.append(run.name)
        loss = 1 + run.point.get("optim.lr", 0)
        (tmp_path / "out" / run.name / "run").mkdir(parents=True, exist_ok=True)
        result = RunResult(
            stage=run.stage, variant=run.variant, point=dict(run.point), seed=run.seed,
            table=dict(run.table), status="done", final={"heldout_bits_per_byte": loss},
            init_from=pool._start_name(run),
        )  # fmt: skip
        write_result(tmp_path / "out" / run.name, result)

    monkeypatch.setattr("megalodon_jax.study.schedule._Pool._run_one", run_one)
    monkeypatch.setattr("megalodon_jax.study.schedule._Pool.write_examples", lambda *_: None)
    text = study_file.read_text().replace("[1e-2]", "[1e-3, 1e-2]")
    study_file.write_text(text)
    study = read_study(study_file)
    first = run_study(study, tmp_path / "out")
    assert ran[-1] == "tuned/broken/seed=3"
    assert first.runs[-1].init_from == "final/broken/lr=0.001,seed=3"
    assert len(ran) == len(first.runs) == 8
    # The results alone on another machine: nothing runs, until a run needs one's weights.
    shutil.rmtree(tmp_path / "out")
    ran.clear()
    assert run_study(study, tmp_path / "out", earlier=first).runs == first.runs
    assert not ran
    shutil.rmtree(tmp_path / "out/tuned/base")
    assert run_study(study, tmp_path / "out").runs == first.runs
    assert ran == ["final/base/lr=0.001,seed=3", "tuned/base/seed=3"]
    # From another start the weights would be others.
    path = tmp_path / "out/tuned/base/seed=3"
    write_result(path, first.runs[-2]._replace(init_from="final/base/lr=0.01,seed=3"))
    with pytest.raises(ConfigError, match="has the result of another configuration"):
        run_study(study, tmp_path / "out")


def test_examples_are_written_once(study_file, tmp_path, monkeypatch):
    codes = [1, 0]

    def process(_pool, arguments, log, _environment):
        Path(arguments[arguments.index("--out") + 1]).write_text("{}")
        log.write_text("the reason")
        return codes.pop(0)

    monkeypatch.setattr("megalodon_jax.study.schedule._Pool._process", process)
    monkeypatch.setattr("megalodon_jax.study.schedule._Pool._run_one", lambda *_: None)
    study = read_study(study_file)
    file = tmp_path / "data/sums.jsonl"
    with pytest.raises(ConfigError, match="examples sums: the reason"):
        run_study(study, tmp_path / "out")
    assert not file.exists()
    # The second call writes it, the third, of another directory, finds it.
    run_study(study, tmp_path / "out")
    run_study(study, tmp_path / "elsewhere")
    assert file.read_text() == "{}"
    assert codes == []
    study_file.write_text(study_file.read_text().replace('"40"', '"50"'))
    with pytest.raises(ConfigError, match="was not written with the arguments"):
        run_study(read_study(study_file), tmp_path / "out")


@pytest.mark.slow
def test_a_study_with_a_stop_and_a_variant_that_fails(study_file, tmp_path, capsys):
    out = tmp_path / "out"
    study = read_study(study_file)
    stop = threading.Event()
    running = out / "rates/base/lr=0.01,seed=0/run/metrics.jsonl"

    def stop_early() -> None:
        while not running.exists() or not running.read_text():
            if stop.wait(0.05):
                return
        stop.set()

    watcher = threading.Thread(target=stop_early)
    watcher.start()
    try:
        first = run_study(study, out, stop=stop)
    finally:
        stop.set()
        watcher.join()
    assert first.runs == ()
    # One command goes on with it, to the end; a run failed, and so does the command.
    published = tmp_path / "published"
    command = ["study", str(study_file), "--out", str(out), "--results", str(published)]
    assert main(command) == 1
    output = capsys.readouterr().out
    assert "final/base" in output
    assert "| failed with exit code 1: " in output
    results = read_results(published / "tiny.json")
    status = {run.name: run.status for run in results.runs}
    assert status == {
        "rates base lr 0.01 seed 0": "done", "rates broken lr 0.01 seed 0": "failed",
        # The variant without a finished run has no best point.
        "final base lr 0.01 seed 3": "done",
        "tuned base seed 3": "done",
    }  # fmt: skip
    assert "tuned/broken/seed=3: there is no run to start from" in output
    final = results.runs[-2]
    metrics = out / "final/base/lr=0.01,seed=3/run/metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    heldout = [line["heldout_bits_per_byte"] for line in lines if "heldout_loss" in line]
    assert final.final["heldout_bits_per_byte"] == heldout[-1]
    assert [point.step for point in final.heldout] == [2, 4, 6]
    assert final.heldout[-1].tokens == 6 * 2 * 32
    assert final.device == "1 x cpu"
    assert final.parameters > final.parameters_without_embeddings > 0
    assert "missing.txt" in final.failed_evaluations["no_such_file"]
    assert (published / "tiny_tokens.svg").exists()
    tuned = results.runs[-1]
    assert tuned.init_from == "final/base/lr=0.01,seed=3"
    start = str(out / tuned.init_from / "run")
    resolved = json.loads((out / "tuned/base/seed=3/run/config.json").read_text())
    assert resolved["init_from"] == start
    assert [line["digits"] for line in tuned.evaluations["sums"]["results"]] == [1, 3]
    assert "tuned, sums: exact_match (addition)" in output
    assert (published / "tiny_sums.svg").exists()
    # Finished runs are not run again, those of a published file neither.
    before = (out / "results.json").read_bytes()
    assert main(command) == 1
    assert (out / "results.json").read_bytes() == before
    elsewhere = run_study(study, tmp_path / "elsewhere", earlier=results)
    assert [run.name for run in elsewhere.runs if run.status == "done"] == [
        run.name for run in results.runs if run.status == "done"
    ]
    changed = study_file.read_text().replace("loss_chunk_size = 64", "loss_chunk_size = 32")
    study_file.write_text(changed)
    with pytest.raises(ConfigError, match="has the result of another configuration"):
        run_study(read_study(study_file), out)


IMAGES = """
name = "images"
metric = "heldout_accuracy"
mode = "max"
[run]
task = "pixels"
steps = 2
log_every = 1
eval_every = 1
checkpoint_every = 1
compilation_cache = ""
[run.model]
num_classes = 2
num_layers = 1
model_dim = 8
ffn_hidden_dim = 8
[run.examples]
path = "{images}"
[run.data]
seq_len = 16
batch_size = 2
[run.optim]
warmup_steps = 1
[[variants]]
name = "transformer"
settings.model = {{ kind = "transformer_encoder", input = "values", num_heads = 2 }}
[[stages]]
name = "final"
evaluate = true
[[evaluations]]
name = "test"
arguments = ["--best", "--split", "test", "--compilation_cache", ""]
"""


@pytest.mark.slow
def test_a_study_of_images_has_accuracies(tmp_path, shared_compilation, short_prefetch):
    """The commands of a study, in this process."""
    images = np.random.default_rng(0).integers(0, 256, (8, 4, 4)).astype(np.uint8)
    labels = np.arange(8) % 2
    np.savez(tmp_path / "images.npz", images=images, labels=labels, heldout_images=images,
             heldout_labels=labels)  # fmt: skip
    path = tmp_path / "study.toml"
    path.write_text(IMAGES.format(images=tmp_path / "images.npz"))
    study, out = read_study(path), tmp_path / "out"
    (planned,) = stage_runs(study, study.stages[0])
    (out / "evaluations").mkdir(parents=True)
    (out / "config.toml").write_text(to_toml(planned.table))
    assert main(["train", str(out / "config.toml"), "--run_dir", str(out / "run")]) == 0
    for entry in planned.evaluations:
        target = str(out / f"evaluations/{entry.name}.json")
        command = ["evaluate", "--checkpoint", str(out / "run"), "--json", target]
        assert main([*command, *entry.arguments]) == 0
    run = read_run(planned, out, failed_evaluations={})
    results = StudyResults(study.name, study.title, study.metric, (run,), study.mode)
    assert "heldout_accuracy" in run.describe()
    accuracies = [point.values["heldout_accuracy"] for point in run.heldout]
    assert run.evaluations["test"]["results"][0]["accuracy"] == max(accuracies)
    assert run.evaluations["test"]["results"][0]["count"] == 8
    assert "test accuracy" in results_markdown(results)
    assert draw_results(results, tmp_path)
