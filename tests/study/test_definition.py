"""Studies: the runs that a file defines, and the errors of a file."""

import tomllib

import pytest

from megalodon_jax.config import load_config
from megalodon_jax.errors import ConfigError
from megalodon_jax.presets import find_study, study_names
from megalodon_jax.study import read_study, stage_runs
from megalodon_jax.study.definition import start_of
from megalodon_jax.study.toml_text import to_toml

STUDY = """
name = "tiny"
metric = "heldout_loss"
[run]
steps = 3
[run.model]
num_layers = 1
chunk_size = 16
[run.optim]
warmup_steps = 1
[run.data]
source = "files"
files = ["text.txt"]
document_separator = "\\u0000"
[[run.data.heldout_sets]]
name = "books"
files = ["book.txt"]
[[variants]]
name = "base"
[[variants]]
name = "ema"
settings.model.moving_average = "ema"
[[stages]]
name = "rates"
settings.steps = 2
grid."optim.lr" = [1e-3, 2e-3, 4e-3]
grid."model.chunk_size" = [16, 32]
[[stages]]
name = "final"
best_of = "rates"
seeds = [0, 7]
variants = ["ema"]
evaluate = true
[[stages]]
name = "tuned"
init_from = "final"
variants = ["ema"]
seeds = [7]
[[evaluations]]
name = "context"
arguments = ["--task", "perplexity_by_context", "--files", "book.txt"]
[[examples]]
name = "keys"
arguments = ["passkey", "--out", "keys.jsonl", "--count", "10"]
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str):
        path = tmp_path / "study.toml"
        path.write_text(text)
        return path

    return write


def test_runs_are_the_product_of_variants_points_and_seeds(write):
    study = read_study(write(STUDY))
    runs = stage_runs(study, study.stages[0])
    assert len({run.name for run in runs}) == len(runs) == 2 * 3 * 2
    # Variants alternate: a study that is cut short has as many points of each.
    assert [run.variant for run in runs[:4]] == ["base", "ema"] * 2
    last = runs[-1].config("runs/x")
    assert (last.run_dir, last.steps, last.optim.lr) == ("runs/x", 2, 4e-3)
    assert last.model.kind == "megalodon"
    assert (last.model.moving_average, last.model.chunk_size) == ("ema", 32)
    assert (last.model.num_layers, last.data.document_separator) == (1, "\0")
    assert runs[0].name == "rates/base/lr=0.001,chunk_size=16,seed=0"
    assert not runs[0].evaluations


def test_a_stage_takes_the_best_point_of_an_earlier_one(write):
    study = read_study(write(STUDY))
    point = {"optim.lr": 2e-3, "model.chunk_size": 16}
    runs = stage_runs(study, study.stages[1], {"ema": point, "base": point})
    assert [run.variant for run in runs] == ["ema", "ema"]
    assert [run.config("x").optim.lr for run in runs] == [2e-3, 2e-3]
    assert [run.config("x").seed for run in runs] == [0, 7]
    assert [run.config("x").data.shuffle_seed for run in runs] == [0, 7]
    assert runs[0].evaluations[0].name == "context"
    # A variant without a finished run in the earlier stage has no best point.
    assert not stage_runs(study, study.stages[1], {})


def test_a_run_starts_from_its_variant_and_seed_in_an_earlier_stage(write):
    study = read_study(write(STUDY))
    best = {"ema": {"optim.lr": 2e-3, "model.chunk_size": 16}}
    earlier = stage_runs(study, study.stages[1], best)
    (run,) = stage_runs(study, study.stages[2])
    assert start_of(run, earlier) is earlier[1]
    assert start_of(run, earlier[:1]) is earlier[0]
    assert start_of(run, stage_runs(study, study.stages[0])) is None
    assert study.examples[0].file == "keys.jsonl"


def test_the_file_of_a_run_is_its_configuration(write, tmp_path):
    study = read_study(write(STUDY))
    run = stage_runs(study, study.stages[0])[-1]
    text = to_toml(run.table)
    assert tomllib.loads(text) == run.table
    path = tmp_path / "run.toml"
    path.write_text(f'run_dir = "runs/x"\n{text}')
    assert load_config(path) == run.config("runs/x")


def test_toml_of_unusual_values():
    table = {
        "text": 'a "quote" \\ \x7f \u0000 \u20ac', "numbers": [1, 2.5, 1e-30, float("inf")],
        "empty": [], "nested": {"flag": True, "tables": [{"a": 1}, {"a": [2], "deep": {"b": "c"}}]},
    }  # fmt: skip
    assert tomllib.loads(to_toml(table)) == table


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('name = "tiny"', 'name = "a/b"', "'a/b' is empty or has other characters"),
        ("seeds = [0, 7]", "seed = [0, 7]", "no key 'seed'; did you mean 'seeds'"),
        ("seeds = [0, 7]", 'seeds = ["0"]', "use a list of whole numbers"),
        ('best_of = "rates"', 'best_of = "final"', "best_of is 'final'; use an earlier stage"),
        ('name = "ema"', 'name = "base"', "a variant has the name of another, 'base'"),
        ('"heldout_loss"', '"heldout_accuracy"', "higher values are better; set mode = 'max'"),
        ('name = "tiny"', 'name = "tiny"\nmode = "best"', "mode is 'best'; use 'min' or 'max'"),
        ('variants = ["ema"]', 'variants = ["em"]', "no variant 'em'; did you mean 'ema'"),
        ("[1e-3, 2e-3, 4e-3]", "1e-3", "'optim.lr' is 0.001; use a list of values"),
        ("[1e-3, 2e-3, 4e-3]", "[-1.0]", r"rates/base/lr=-1.0,.*optim.lr is -1.0"),
        ("moving_average", "moving_averages", "moving_averages"),
        ('"--task", ', '"--json", ', "has --json, which the study sets"),
        ("evaluate = true", "evaluate = 1", "use true or false"),
        ('init_from = "final"', 'init_from = "rates"', "'rates', which has a grid"),
        ('init_from = "final"', 'init_from = "tuned"', "init_from is 'tuned'; use an earlier"),
        ("seeds = [7]", "seeds = [8]", "which has no seed 8"),
        ('init_from = "final"\nvariants = ["ema"]', 'init_from = "final"', "not run 'base'"),
        ('"--out", ', "", "have no --out"),
        ("name = \"context\"", 'name = "context"\nstages = ["end"]', "context: no stage 'end'"),
        ("[run]", "[runs]", "no key 'runs'; did you mean 'run'"),
        ("[run]", "[run", "is not valid TOML"),
    ],
)  # fmt: skip
def test_faults_of_a_file_are_named(before, after, message, write):
    assert before in STUDY
    with pytest.raises(ConfigError, match=message):
        read_study(write(STUDY.replace(before, after)))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read study .*missing.toml: No such file"):
        read_study(tmp_path / "missing.toml")
    with pytest.raises(ConfigError, match="shipped study 'ablation_30M'; did you mean"):
        find_study("ablation_30M")


@pytest.mark.parametrize("name", study_names())
def test_shipped_studies_can_run(name):
    """Also that all runs of a stage have the same text, order, batch and number of tokens."""
    study = read_study(find_study(name))
    for stage in study.stages:
        best = {v.name: {} for v in study.variants} if stage.best_of else None
        configs = [run.config("x") for run in stage_runs(study, stage, best)]
        assert (
            len({(c.data.files, c.data.seq_len, c.data.batch_size, c.steps) for c in configs}) == 1
        )
        assert {c.data.shuffle_seed for c in configs} == set(stage.seeds)
