"""Model FLOPs against the matrix products counted one by one, and what a run writes down."""

import json

import pytest

from megalodon_jax.config import ModelConfig
from megalodon_jax.errors import ConfigError
from megalodon_jax.training.metrics import (
    PEAK_FLOPS,
    ProgressDisplay,
    RunLog,
    model_flops_per_token,
    model_flops_utilization,
)


@pytest.mark.parametrize(
    ("preset", "expected"), [("mega200M", 1.29e9), ("mega1.3B", 8.32e9), ("paper_7b", 47.1e9)]
)
def test_flops_of_named_sizes(preset, expected):
    assert model_flops_per_token(ModelConfig.from_preset(preset)) == pytest.approx(
        expected, rel=3e-3
    )


def test_flops_count_every_matrix_product():
    config = ModelConfig(
        num_layers=3, model_dim=8, z_dim=4, value_dim=12, num_heads=2, ffn_hidden_dim=20,
        chunk_size=16, vocab_size=50, norm_num_groups=2, swiglu=True,
    )  # fmt: skip
    products = [(8, 4), (8, 12), (8, 12), (8, 8), (12, 8), (8, 20), (8, 20), (20, 8)]
    dense = sum(2 * rows * columns for rows, columns in products)
    length = 10
    # A token at place t of a row shorter than a chunk meets t + 1 keys, twice: scores and values.
    attention = sum(2 * (t + 1) * (4 + 12) for t in range(length)) / length
    expected = 3 * (3 * (dense + attention) + 2 * 8 * 50)
    assert model_flops_per_token(config, seq_len=length) == pytest.approx(expected)


def test_utilization_is_known_only_where_the_peak_is():
    peak = PEAK_FLOPS["NVIDIA H200"]
    half = model_flops_utilization(peak / 1e9, 1e9, device_kind="NVIDIA H200", device_count=2)
    assert half == pytest.approx(0.5)
    assert model_flops_utilization(1e3, 1e9, device_kind="cpu", device_count=1) is None


def test_log_lines_are_strict_json_and_append(tmp_path):
    for first_step in (0, 2):
        log = RunLog(tmp_path, config={}, first_step=first_step)
        log.write(first_step + 1, {"loss": 1.5, "mfu": None, "grad_norm": float("nan")})
        log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, second = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert first == {"step": 1, "loss": 1.5, "grad_norm": "nan"}
    assert second["step"] == 3
    assert list((tmp_path / "tensorboard").iterdir())


def test_wandb_that_is_not_installed_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ConfigError, match="wandb is not installed"):
        RunLog(tmp_path, config={}, wandb_project="p")


def test_progress_is_plain_lines_without_a_terminal(capsys):
    with ProgressDisplay(first_step=0, steps=10) as display:
        display.advance(1)
        display.report(5, "loss 1.0000")
        display.message("[note]")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 5/10  loss 1.0000  left 0:00:")
    assert lines[1] == "[note]"
