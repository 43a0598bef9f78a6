"""Configurations drawn at random: each trains three finite steps, or is refused with a clear error.

The number of runs is `MEGALODON_RANDOM_CONFIGS` (4 if not set):

    MEGALODON_RANDOM_CONFIGS=30 pytest -s tests/faults/test_configs.py
"""

import dataclasses
import itertools
import json
import math
import os
from pathlib import Path
from typing import Any, get_args

import jax
import pytest
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis import strategies as st

from megalodon_jax.config import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    TransformerConfig,
    config_from_dict,
)
from megalodon_jax.config.checks import choices_of, scalar_type
from megalodon_jax.config.ranges import Range, plain_type, range_of
from megalodon_jax.errors import ConfigError, DataError

NUM_RUNS = int(os.environ.get("MEGALODON_RANDOM_CONFIGS", "4"))
# Sizes at which a step is cheap, as (low, high).
SIZES = {
    "num_layers": (1, 2), "model_dim": (2, 24), "z_dim": (2, 16), "value_dim": (1, 16),
    "num_heads": (1, 4), "num_kv_heads": (1, 4), "ffn_hidden_dim": (1, 16), "cema_ndim": (1, 33),
    "chunk_size": (1, 32), "vocab_size": (250, 300), "output_size": (1, 300),
    "norm_num_groups": (1, 6), "norm_prior_count": (0, 3), "attention_window": (1, 40),
    "seq_len": (1, 40), "batch_size": (1, 6), "num_shards": (0, 3), "num_workers": (0, 0),
    "replica": (1, 2), "data": (1, 2), "chunk": (1, 2), "model": (1, 2),
    "warmup_steps": (0, 3), "accumulate_steps": (1, 3), "loss_chunk_size": (1, 70),
    "log_every": (1, 1), "eval_every": (0, 3), "eval_batches": (0, 2),
    "final_eval_batches": (0, 2), "checkpoint_every": (0, 3), "keep_checkpoints": (1, 2),
    "sample_tokens": (0, 3), "steps": (3, 3),
}  # fmt: skip
# The largest values at which three steps can be finite; the configuration allows more.
LARGEST = {"lr": 0.1, "z_loss": 10.0, "weight_decay": 9.0, "clip_norm": 1e6, "rope_base": 1e12}
# Kernels of devices that the tests have not; settings that name files and services.
LEFT_OUT = {
    "pallas_tpu", "mosaic_gpu", "triton", "splash", "cudnn", "kind", "task", "source", "files",
    "run_dir", "heldout_files", "text_field", "document_separator", "tokenizer", "init_from",
    "resume", "wandb_project", "sample_prompt", "processes",
}  # fmt: skip


def values_of(entry: dataclasses.Field) -> st.SearchStrategy | None:
    """Values of one setting from its type and range; None if it is not drawn."""
    kind, allowed = plain_type(entry.type), range_of(entry.type)
    choices = [value for value in choices_of(kind) if value not in LEFT_OUT]
    optional = [st.none()] if type(None) in get_args(kind) else []
    if entry.name in LEFT_OUT:
        return None
    if entry.name.endswith("_implementation"):
        # The reference compiles fastest.
        return st.sampled_from(["reference"] * 4 + choices)
    if choices:
        return st.one_of(st.sampled_from(choices), *optional)
    scalar = scalar_type(kind)
    if scalar is bool:
        return st.booleans()
    if scalar is int and entry.name in SIZES:
        return st.one_of(st.integers(*SIZES[entry.name]), *optional)
    if scalar is float and isinstance(allowed, Range):
        high = LARGEST.get(entry.name, allowed.high)
        low = allowed.low or 0.0
        inside = st.floats(
            low, high, exclude_min=allowed.open_low, exclude_max=allowed.open_high and high == 1.0
        )
        return st.one_of(st.just(entry.default), inside, *optional)
    return st.integers(0, 2**32 - 1) if "seed" in entry.name else None


def table_of(config: type) -> st.SearchStrategy[dict[str, Any]]:
    """Tables with some settings of a configuration class; the others keep their defaults."""
    drawn = {
        entry.name: values
        for entry in dataclasses.fields(config)
        if (values := values_of(entry)) is not None
    }
    required = {name for name in drawn if name in SIZES or name.endswith("_implementation")}
    sizes = {name: values for name, values in drawn.items() if name in required}
    others = {name: values for name, values in drawn.items() if name not in required}
    return st.builds(
        lambda required, optional: {**required, **optional},
        st.fixed_dictionaries(sizes),
        st.fixed_dictionaries({}, optional=others),
    )


@st.composite
def run_tables(draw: st.DrawFn) -> dict[str, Any]:
    """Tables of a run."""
    table = draw(table_of(TrainConfig))
    kind = draw(st.sampled_from([ModelConfig, TransformerConfig]))
    table["model"] = {**draw(table_of(kind)), "kind": kind().kind}
    table["optim"] = draw(table_of(OptimConfig))
    table["data"] = draw(table_of(DataConfig))
    table["mesh"] = draw(table_of(MeshConfig))
    # Most draws violate a divisibility; half of them are mended, so that they train.
    if draw(st.booleans()):
        heads = draw(st.integers(1, 2))
        groups = draw(st.integers(1, 3))
        table["model"] |= {"model_dim": 4 * heads * groups, "num_heads": heads}
        table["model"] |= (
            {"z_dim": 2 * heads, "value_dim": 3 * heads, "norm_num_groups": groups}
            if kind is ModelConfig
            else {"num_kv_heads": heads}
        )
        table["model"] |= {"vocab_size": draw(st.integers(257, 300)), "output_size": None}
        table["data"] |= {"seq_len": 32, "batch_size": 4, "num_shards": 1}
        table["mesh"] = {}
        if kind is ModelConfig:
            table["model"] |= {"chunk_size": draw(st.sampled_from([4, 8, 16])), "cema_ndim": 3}
    return table


SHORT = settings(
    max_examples=NUM_RUNS,
    deadline=None,
    database=None,
    # The long form draws others every time; hypothesis prints the failing one.
    derandomize=NUM_RUNS == 4,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.slow
def test_a_random_configuration_trains_or_is_refused(
    shared_compilation, short_prefetch, text_file, tmp_path
):
    from megalodon_jax.training.loop import train

    numbers = itertools.count()
    outcomes: list[str] = []

    @SHORT
    @given(run_tables())
    def run(table: dict[str, Any]) -> None:
        run_dir = tmp_path / str(next(numbers))
        table["data"] |= {"files": [str(text_file)], "source": "files", "document_separator": "\0"}
        table["data"] |= {"heldout_fraction": 0.2}
        try:
            config = config_from_dict({**table, "run_dir": str(run_dir)})
        except ConfigError:
            reject()  # counts the configurations that are built
        print(f"configuration {run_dir.name}: {table}", flush=True)
        try:
            train(config)
        # Refused: before the first step.
        except (ConfigError, DataError) as error:
            assert len(str(error)) > 20  # noqa: PT017
            assert not (run_dir / "checkpoints").exists()
            outcomes.append(f"refused: {error}")
        else:
            losses = losses_of(run_dir)
            assert len(losses) == 3
            assert all(map(math.isfinite, losses))
            outcomes.append(f"trained: {losses}")
        finally:
            jax.clear_caches()

    run()
    print("\n".join(outcomes))
    assert any(outcome.startswith("trained") for outcome in outcomes)


def losses_of(run_dir: Path) -> list[float]:
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.slow
@settings(max_examples=80, deadline=None, database=None, derandomize=True)
@given(run_tables())
def test_a_configuration_round_trips_or_is_refused(table: dict[str, Any]):
    try:
        config = config_from_dict(table)
    except ConfigError as error:
        assert str(error).isprintable()  # noqa: PT017
        return
    stored = json.loads(json.dumps(dataclasses.asdict(config), allow_nan=False))
    assert config_from_dict(stored) == config


@settings(max_examples=80, deadline=None, database=None, derandomize=True)
@given(
    st.sampled_from([TrainConfig, ModelConfig, TransformerConfig, DataConfig, OptimConfig]),
    st.data(),
)
@pytest.mark.slow
def test_any_value_of_any_setting_is_accepted_or_refused(config: type, data: st.DataObject):
    entry = data.draw(st.sampled_from(dataclasses.fields(config)))
    anything = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.text()),
        st.dictionaries(st.text(), st.integers()), st.just(10**400), st.just(float("nan")),
    )  # fmt: skip
    tables = {ModelConfig: "model", TransformerConfig: "model", DataConfig: "data"}
    tables[OptimConfig] = "optim"
    value = data.draw(anything)
    kind = {"kind": "transformer"} if config is TransformerConfig else {}
    table = {**kind, entry.name: value}
    try:
        config_from_dict({tables[config]: table} if config in tables else table)
    except ConfigError as error:
        assert entry.name in str(error)  # noqa: PT017
