"""`megalodon tune`: measures every implementation, never chooses a wrong one, writes a file."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megalodon_jax.bench import tune
from megalodon_jax.bench.op_cases import RowwiseCase
from megalodon_jax.cli.main import main
from megalodon_jax.config import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    TrainConfig,
    load_config,
)
from pallas_kernels.common.measured_choice import choices_file, read_choices
from pallas_kernels.rowwise import api as rowwise_api
from pallas_kernels.rowwise import xla

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
CONFIG = """
[model]
num_layers = 1
model_dim = 16
z_dim = 4
value_dim = 32
num_heads = 1
ffn_hidden_dim = 16
cema_ndim = 2
chunk_size = 16
norm_num_groups = 2
[data]
seq_len = 32
batch_size = 2
"""


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_cases_have_the_shapes_of_one_device():
    model = ModelConfig(
        model_dim=64, z_dim=8, value_dim=96, num_heads=2, norm_num_groups=4, chunk_size=128,
    )  # fmt: skip
    data, mesh = DataConfig(seq_len=256, batch_size=8), MeshConfig(data=2, chunk=4)
    config = TrainConfig(model=model, data=data, mesh=mesh)
    cases = {operation: (width, str(case)) for operation, width, case in tune.tuned_cases(config)}
    assert cases["cema"] == (64, "B 4 L 64 D 64 N 16")
    assert cases["timestep_norm"] == (64, "B 4 L 64 D 64 G 4")
    assert cases["chunk_attention"] == (48, "B 4 L 64 H 2 K 4 V 48 C 64")
    assert cases["silu_gate"][0] == 96


def test_encoders_tune_non_causal_attention():
    config = load_config(CONFIGS / "tasks" / "lra_image.toml")

    def attention(**changes):
        model = dataclasses.replace(config.model, **changes)
        cases = tune.tuned_cases(dataclasses.replace(config, model=model))
        return [(operation, width, str(case)) for operation, width, case in cases
                if "attention" in operation]  # fmt: skip

    sizes = "B 50 L 1024 H 1 K 96 V 320"
    assert attention() == [("noncausal_attention", 320, f"{sizes} C 128")]
    assert attention(chunk_size=None) == [("noncausal_attention", 320, f"{sizes} C 1024")]
    assert attention(causal=True) == [("chunk_attention", 320, f"{sizes} C 128")]


def test_a_wrong_or_failing_implementation_is_never_chosen(monkeypatch):
    class Wrong:
        @staticmethod
        def rms_norm(x, scale, *, eps, dtype):
            return 1.01 * xla.rms_norm(x, scale, eps=eps, dtype=dtype)

    class Failing:
        @staticmethod
        def rms_norm(x, scale, *, eps, dtype):
            raise NotImplementedError("not on this device")

    added = {"mosaic_gpu": Wrong, "triton": Failing}
    monkeypatch.setattr(rowwise_api, "IMPLEMENTATIONS", rowwise_api.IMPLEMENTATIONS | added)
    case = RowwiseCase(2, 8, 16, "rms_norm")
    found = list(tune.measure_candidates(case, "plain", np.random.default_rng(0)))
    assert [(each.implementation, each.verdict) for each in found[:2]] == [
        ("xla", "ok"), ("mosaic_gpu", "wrong"),
    ]  # fmt: skip
    assert found[2].implementation == "triton"
    assert found[2].seconds is None
    # However fast it is.
    fast = [each._replace(seconds=1e-9) if each.verdict == "wrong" else each for each in found]
    assert tune.choose(fast) == "xla"
    assert tune.choose(fast[1:]) is None
    assert "error" in tune.format_candidate(fast[1])


@pytest.mark.slow
def test_command_writes_prints_and_resets(tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text(CONFIG)
    assert main(["tune", str(file)]) == 0
    printed = capsys.readouterr().out
    for name in ("cema", "timestep_norm", "chunk_attention", "silu_gate", "fastest: xla"):
        assert name in printed
    if jax.default_backend() == "cpu":
        assert "needs an NVIDIA Hopper" in printed
    kind = jax.devices()[0].device_kind
    operations = {choice.operation for choice in read_choices(kind)}
    assert {"cema", "timestep_norm", "chunk_attention", "rms_norm"} <= operations
    assert json.loads(choices_file().read_text())[kind][0]["tokens"] == 64
    assert main(["tune", "--reset"]) == 0
    assert not choices_file().exists()
    assert "removed" in capsys.readouterr().out


def test_other_models_and_a_missing_config_are_refused(capsys):
    from megalodon_jax.config import TransformerConfig
    from megalodon_jax.errors import ConfigError

    config = dataclasses.replace(TrainConfig(), model=TransformerConfig())
    with pytest.raises(ConfigError, match="only MEGALODON and encoders have operations to tune"):
        tune.tuned_cases(config)
    assert main(["tune"]) != 0
    assert "no config given" in capsys.readouterr().err


def test_measured_in_bfloat16():
    (_, _, case), *_ = tune.tuned_cases(TrainConfig())
    inputs = case.make_inputs(np.random.default_rng(0), "plain", "initial")
    assert inputs.differentiable["x"].dtype == jnp.bfloat16
