"""Ranges of settings: refused from Python, a file and the command line, all faults in one error."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from megalodon_jax.cli.help import described
from megalodon_jax.cli.main import main
from megalodon_jax.config import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    ProcessesConfig,
    TrainConfig,
    TransformerConfig,
    config_from_dict,
)
from megalodon_jax.config.checks import add_fault, check, collect_faults, scalar_type
from megalodon_jax.config.ranges import Range, Weight, plain_type, range_of
from megalodon_jax.errors import ConfigError
from megalodon_jax.optimizer import make_optimizer

TABLES: dict[str, type] = {
    "model": ModelConfig, "data": DataConfig, "optim": OptimConfig, "mesh": MeshConfig,
    "processes": ProcessesConfig, "": TrainConfig,
}  # fmt: skip
NAN, INF = math.nan, math.inf
# (setting, value, part of the message)
FAULTS: list[tuple[str, Any, str]] = [
    ("optim.beta1", 1.5, "must be in [0, 0.999999]"),
    ("optim.beta2", 1.0, "must be in [0, 0.999999]"),
    ("optim.beta2", -0.1, "must be in [0, 0.999999]"),
    ("optim.lr", NAN, "must be finite"),
    ("optim.lr", INF, "must be finite"),
    ("optim.lr", 0.0, "must be positive"),
    ("optim.lr", 10**400, "must be finite"),
    ("optim.eps", -1e-8, "must be in [1e-20, 1]"),
    ("optim.lr", 1e39, "must be finite in float32"),
    ("optim.eps", 1.7e308, "must be in [1e-20, 1]"),
    ("optim.eps", 0.0, "must be in [1e-20, 1]"),
    ("optim.weight_decay", -0.1, "must not be negative"),
    ("optim.weight_decay", INF, "must be finite"),
    ("optim.clip_norm", -1.0, "must be at least 1e-20, or 0 for no clipping"),
    ("optim.clip_norm", 1e-30, "must be at least 1e-20, or 0 for no clipping"),
    ("optim.clip_norm", NAN, "must be finite"),
    ("optim.init_ratio", -1.0, "must be in [0, 1]"),
    ("optim.end_ratio", 5.0, "must be in [0, 1]"),
    ("optim.warmup_steps", -1, "must not be negative"),
    ("optim.warmup_steps", 1001, "longer than the run of steps = 1000"),
    ("optim.accumulate_steps", 10**23, "must be at most 1,000,000"),
    ("z_loss", -1.0, "must not be negative"),
    ("z_loss", NAN, "must be finite"),
    ("steps", 2**63, "must be at most"),
    ("seed", -1, "must not be negative"),
    ("seed", 2**32, "must be at most"),
    ("eval_every", -5, "must not be negative"),
    ("checkpoint_every", -1, "must not be negative"),
    ("log_every", 0, "must be at least 1"),
    ("sample_tokens", -1, "must not be negative"),
    ("run_dir", "", "must not be empty"),
    ("run_dir", "runs/\0", "must not contain NUL"),
    ("sample_prompt", "\udc80", "without surrogates"),
    ("resume", 1, "1 is not of type bool"),
    ("model.norm_eps", -1e-5, "must be in [1e-12, 1]"),
    ("model.norm_eps", NAN, "must be finite"),
    ("model.rope_base", 0, "must be positive, or None"),
    ("model.rope_base", NAN, "must be finite in float32, or None"),
    ("model.rope_base", 1e-30, "must be in [1, 1e12], or None"),
    ("model.output_size", 0, "must be at least 1, or None"),
    ("model.model_dim", 10**23, "must be at most 1,000,000"),
    ("model.num_layers", 10**6, "must be at most 100,000"),
    ("model.dropout", NAN, "must be finite"),
    ("model.num_heads", True, "True is not of type int"),
    ("model.remat", 3, "use one of 'off', 'none', 'inputs'"),
    ("data.heldout_files", "", "use a list of texts"),
    ("data.files", "abc.txt", "use a list of texts"),
    ("data.files", [""], "must not be empty"),
    ("data.files", [3], "use a text"),
    ("data.files", ["a\0b"], "must not contain NUL"),
    ("data.heldout_fraction", 1.0, "must be in [0, 1)"),
    ("data.seq_len", 1, "must be at least 2"),
    ("data.num_workers", -1, "must not be negative"),
    ("data.shuffle_seed", 2**32, "must be at most"),
    ("data.tokenizer", "", "must not be empty"),
    ("mesh.data", 0, "must be at least 1, or -1 for the remaining devices"),
    ("mesh.data", 10**23, "must be at most"),
    ("processes.count", -1, "must not be negative"),
]  # fmt: skip


@pytest.mark.parametrize(("setting", "value", "message"), FAULTS)
def test_a_value_out_of_range_is_refused(setting: str, value: Any, message: str):
    table, _, name = setting.rpartition(".")
    with pytest.raises(ConfigError) as from_file:
        config_from_dict({table: {name: value}} if table else {name: value})
    assert setting in str(from_file.value)
    assert message in str(from_file.value)
    is_rule_between_tables = "longer than the run" in message
    if not is_rule_between_tables:
        with pytest.raises(ConfigError) as from_python:
            TABLES[table](**{name: value})
        assert message in str(from_python.value)


def test_tables_are_of_their_class():
    wrong: Any = 3
    with pytest.raises(ConfigError, match="optim is 3; give a OptimConfig"):
        TrainConfig(optim=wrong)
    with pytest.raises(ConfigError, match="model is 3; give a ModelConfig or TransformerConfig"):
        TrainConfig(model=wrong)


def test_all_faults_of_all_tables_are_in_one_error():
    broken: dict[str, Any] = {
        "steps": 0, "seed": "first", "stepz": 3,
        "model": {"num_layers": 0, "z_dim": 7, "remat": "blok", "preset": "mega2M"},
        "data": {"heldout_files": "", "seq_len": 2.5, "source": "tfds"},
        "optim": {"beta1": 1.5, "lr": "high"},
        "mesh": {"data": -1, "chunk": -1},
        "processes": 3,
    }  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        config_from_dict(broken)
    for part in (
        "steps is 0", "'first' is not of type int: seed", "unknown key 'stepz'",
        "no model preset 'mega2M'", "model.num_layers is 0", "z_dim / num_heads is 7",
        "model.remat is 'blok'", "data.heldout_files is ''", "2.5 is not of type int",
        "data.tfds_name is empty", "optim.beta1 is 1.5", "'high' is not of type float: optim.lr",
        "mesh has -1 more than once", "processes must be a table",
    ):  # fmt: skip
        assert part in str(caught.value)
    # Rules that read a value at fault are left out.
    assert "warmup_steps" not in str(caught.value)


def test_the_command_line_refuses_before_anything_is_created(tmp_path, capsys):
    run_dir = tmp_path / "run"
    options = {"optim.beta1": "nan", "steps": "20", "data.seq_len": "1", "model.num_heads": "0"}
    arguments = [text for name, value in options.items() for text in (f"--{name}", value)]
    assert main(["train", "first_run", "--run_dir", str(run_dir), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for part in (
        "optim.beta1 is nan; must be finite", "data.seq_len is 1", "model.num_heads is 0",
        "optim.warmup_steps is 40, longer than the run of steps = 20",
    ):  # fmt: skip
        assert part in line
    assert not run_dir.exists()


@pytest.mark.parametrize(
    "limit",
    [{"beta1": 0.999999}, {"beta2": 0.999999}, {"beta1": 0.0, "beta2": 0.0}, {"eps": 1e-20},
     {"clip_norm": 1e-20}, {"clip_norm": 0.0}, {"init_ratio": 0.0}, {"end_ratio": 0.0}],
    ids=str,
)  # fmt: skip
def test_updates_at_the_limits_are_finite(limit: dict[str, float]):
    optimizer = make_optimizer(OptimConfig(warmup_steps=2, **limit), total_steps=4)
    params = jnp.ones(4)
    state = optimizer.init(params)
    # Gradients whose squares underflow, also after an ordinary one.
    for gradient in ([1.0, 0.0, 1e-20, 1e-25], [0.0] * 4, [1e3, 1.0, 0.0, 1e-38]):
        updates, state = optimizer.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
        assert bool(jnp.all(jnp.abs(params - 1.0) < 1.0)), params


@pytest.mark.parametrize("config", [*TABLES.values(), TransformerConfig])
def test_every_number_has_a_range(config: type):
    without = [
        entry.name
        for entry in dataclasses.fields(config)
        if scalar_type(plain_type(entry.type)) in (int, float) and range_of(entry.type) is None
    ]
    assert not without, "write a Range beside them (megalodon_jax/config/ranges.py)"


def test_help_shows_the_range():
    kinds = {entry.name: str(entry.type) for entry in dataclasses.fields(described(OptimConfig))}
    assert "Range: [0, 0.999999]." in kinds["beta1"]
    assert "Range: at least 1." in kinds["accumulate_steps"]


def test_numbers_of_numpy_and_whole_floats_are_accepted():
    assert OptimConfig(lr=np.float32(0.5), warmup_steps=np.int64(3), clip_norm=1).warmup_steps == 3
    assert config_from_dict({"optim": {"lr": 1}}).optim == OptimConfig(lr=1.0)
    assert DataConfig(source="files", files=["a.txt"]).files


@pytest.mark.parametrize(
    ("allowed", "inside", "outside"),
    [
        (Range(low=0.0, high=1.0, open_low=True), [1e-9, 1.0], [0.0, -1.0, 1.1, NAN]),
        (Range(low=0.0, high=1.0, open_high=True), [0.0, 0.5], [1.0, -1e-9, INF, -INF]),
        (Range(low=1, high=32), [1, 32], [0, 33]),
        (Range(low=1, high=9, special=(-1, "the rest")), [-1, 1, 9], [0, -2, 10]),
        (Range(), [-1e38, 0], [NAN, INF, 1e39, 10**400]),
    ],
    ids=str,
)
def test_bounds(allowed: Range, inside: list, outside: list):
    assert [value for value in inside if allowed.problem(value) is not None] == []
    assert [value for value in outside if allowed.problem(value) is None] == []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    weight: Weight = 1.0

    def __post_init__(self) -> None:
        check(self, "entry")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithEntries:
    entries: tuple[Entry, ...] = ()
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check(self, "table")


def test_lists_of_tables_are_checked():
    assert WithEntries(entries=(Entry(weight=2),), names=["a"]).entries[0].weight == 2
    with pytest.raises(ConfigError, match=r"table\.entries has the entry 3; use a table; .*names"):
        WithEntries(entries=(3,), names="a")
    with pytest.raises(ConfigError, match=r"entry\.weight is -1; must not be negative"):
        WithEntries(entries=(Entry(weight=-1),))


def collect_three_faults() -> None:
    with collect_faults():
        add_fault("a")
        Entry(weight=-1)
        WithEntries(names="x")


def test_faults_are_collected_until_the_end():
    with pytest.raises(ConfigError, match=r"^a; entry\.weight is -1; .*; table\.names is 'x'; use"):
        collect_three_faults()
    with collect_faults() as faults:
        Entry(weight=1)
    assert faults == []
