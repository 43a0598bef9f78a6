"""Configuration: files, presets, and errors that say what came in and what to do."""

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import pytest

from megalodon_jax.config import (
    MeshConfig,
    ModelConfig,
    ModelOperation,
    TrainConfig,
    config_from_dict,
    load_config,
)
from megalodon_jax.errors import ConfigError
from megalodon_jax.presets import configs_dir, preset_names

NAMED_SIZES = {  # layers, D, H, Z, E, F, swiglu, C, G, rope base, scale and share embedding
    "mega200M": (12, 1024, 1, 256, 2048, 2560, False, 2048, 32, 1e4, False),
    "mega1.3B": (24, 2048, 2, 512, 4096, 4864, False, 2048, 64, 1e4, False),
    "mega1.3B_pg19": (24, 2048, 2, 512, 4096, 3584, True, 2048, 64, 1e4, True),
    "mega7.1B": (32, 4096, 4, 1024, 8192, 11264, False, 2048, 64, 1e4, False),
    "mega7.3B": (32, 4096, 4, 1024, 8192, 8192, True, 2048, 64, 1e4, False),
    "paper_7b": (32, 4096, 4, 1024, 8192, 8192, True, 4096, 64, 1e5, False),
}


def test_presets_are_the_named_sizes():
    assert set(NAMED_SIZES) <= set(preset_names())
    for name, row in NAMED_SIZES.items():
        c = ModelConfig.from_preset(name)
        assert row == (
            c.num_layers, c.model_dim, c.num_heads, c.z_dim, c.value_dim, c.ffn_hidden_dim,
            c.swiglu, c.chunk_size, c.norm_num_groups, c.rope_base, c.scale_emb,
        )  # fmt: skip
        assert c.share_emb == c.scale_emb
        assert (c.cema_ndim, c.norm_eps, c.norm_affine, c.vocab_size) == (16, 1e-5, True, 32_000)
        assert c.dropout == c.hidden_dropout == c.attention_dropout == 0.0


def test_preset_with_overrides_and_unknown_preset():
    assert ModelConfig.from_preset("mega1.3B", dtype="bfloat16").dtype == "bfloat16"
    with pytest.raises(
        ConfigError, match=r"no model preset 'mega1\.4B'; did you mean 'mega1\.3B'\?"
    ):
        ModelConfig.from_preset("mega1.4B")
    with pytest.raises(ConfigError, match=r"unknown key 'chunksize' in model; .*'chunk_size'"):
        ModelConfig.from_preset("mega1.3B", chunksize=3)


def test_mesh_presets():
    assert MeshConfig.from_preset("released") == MeshConfig(data=128, chunk=2)
    assert config_from_dict({"mesh": {"preset": "fsdp_model", "model": 4}}).mesh == MeshConfig(
        data=-1, model=4
    )
    with pytest.raises(ConfigError, match="no mesh preset 'fdsp'; did you mean 'fsdp'"):
        config_from_dict({"mesh": {"preset": "fdsp"}})


def test_shipped_configurations_load():
    studies = configs_dir() / "studies"
    files = sorted(path for path in configs_dir().rglob("*.toml") if path.parent != studies)
    assert configs_dir() / "first_run.toml" in files
    for file in files:
        assert isinstance(load_config(file), TrainConfig), file


def test_dict_round_trip(tmp_path: Path):
    config = config_from_dict(
        {"model": {"preset": "mega200M", "chunk_size": 512}, "data": {"files": ["a.txt", "b.txt"]}}
    )
    assert config.model.chunk_size == 512
    assert config.model.model_dim == 1024
    assert config_from_dict(dataclasses.asdict(config)) == config


def test_a_number_is_none_by_its_text(tmp_path: Path, monkeypatch):
    path = tmp_path / "config.toml"
    path.write_text("[model]\nrope_base = 'none'\noutput_size = 'none'\nmoving_average = 'none'")
    model = load_config(path).model
    assert model == ModelConfig(rope_base=None, output_size=None, moving_average="none")
    config = config_from_dict({"model": {"preset": "mega200M", "rope_base": "none"}})
    assert config.model == ModelConfig.from_preset("mega200M", rope_base=None)
    # `asdict` has None itself, as have the checkpoints' JSON files.
    as_json = json.loads(json.dumps(dataclasses.asdict(config)))
    assert config_from_dict(as_json) == config
    monkeypatch.setattr("megalodon_jax.config.model.read_preset", lambda *_: {"rope_base": "none"})
    assert ModelConfig.from_preset("without_positions").rope_base is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[modle]\nx = 1", r"unknown key 'modle' in config; did you mean 'model'\?"),
        ("[optim]\nlearning_rate = 1", "unknown key 'learning_rate' in optim"),
        ("[optim]\nwarmup = 1", r"unknown key 'warmup' in optim; did you mean 'warmup_steps'\?"),
        ("[optim]\nlr = 'high'", r"'high' is not of type float.*optim\.lr"),
        ("[model]\nnum_layers = 2.5", r"2\.5 is not of type int.*model\.num_layers"),
        ("[model]\nswiglu = 1", r"1 is not of type bool.*model\.swiglu"),
        ("[model]\ndtype = 'float16'", r"dtype is 'float16'.*use 'bfloat16'"),
        ("[model]\ninit_mode = 'zeros'", r"init_mode is 'zeros'; use one of 'he', 'xavier'"),
        ("[model]\nz_dim = 255\nnum_heads = 2", "z_dim 255 is not a multiple of num_heads 2"),
        ("[model]\nnorm_num_groups = 100", r"model_dim 1024 must be a multiple.*groups 100"),
        ("[model]\ndropout = 1.0", r"model\.dropout is 1\.0; must be in \[0, 1\)"),
        ("[model]\ncema_ndim = 33", "use 1 to 32"),
        ("[model]\nrope_base = 'None'", r"model\.rope_base is 'None'; use .* float, or \"none\""),
        ("[model]\noutput_size = 'all'", r"output_size is 'all'; use a number of type int, or"),
        ("[model]\nrope_base = 0", r"model\.rope_base is 0\.0; must be positive, or None"),
        ("[model]\nnum_layers = 'none'", r"'none' is not of type int.*model\.num_layers"),
        ("[model]\ntime_norm = 'batch'", r"time_norm is 'batch'; use one of 'timestep', 'layer'"),
        (
            "[model]\ntime_norm = 'rms'\nnorm_prior_count = 2",
            r"norm_prior_count is 2 and time_norm 'rms'; only TimestepNorm has a prior",
        ),
        ("[data]\nsource = 'files'", r"data\.files is empty"),
        ("steps = 0", "steps is 0; must be at least 1"),
        ("steps = [", "not valid TOML"),
        ("model = 3", "model must be a table, got 3"),
    ],
)
def test_errors(tmp_path: Path, text: str, message: str):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


def test_missing_file(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"cannot read config .*absent\.toml: No such file"):
        load_config(tmp_path / "absent.toml")


@pytest.mark.parametrize("operation", get_args(ModelOperation))
def test_implementation_overrides_the_four_settings(operation: ModelOperation):
    single: Any = {f"{operation}_implementation": "reference"}
    assert ModelConfig(**single).implementation_of(operation) == "reference"
    assert ModelConfig(**single, implementation="xla").implementation_of(operation) == "xla"
    assert ModelConfig().implementation_of(operation) is None
    others = set(get_args(ModelOperation)) - {operation}
    assert {ModelConfig(**single).implementation_of(other) for other in others} == {None}


def test_triton_has_kernels_of_all_operations():
    config = ModelConfig(implementation="triton")
    chosen = {config.implementation_of(name) for name in get_args(ModelOperation)}
    assert chosen == {"triton"}
    single = ModelConfig(attention_implementation="triton")
    assert single.implementation_of("attention") == "triton"
    assert single.whole_row_attention_implementation == "triton"
    # Whole rows are faster in XLA.
    assert config.whole_row_attention_implementation == "xla"


def test_norms_and_gates_have_no_tpu_kernels():
    config = ModelConfig(implementation="pallas_tpu")
    chosen = {name: config.implementation_of(name) for name in get_args(ModelOperation)}
    assert chosen == {
        "cema": "pallas_tpu", "timestep_norm": "pallas_tpu", "attention": "pallas_tpu",
        "rowwise": "xla",
    }  # fmt: skip
