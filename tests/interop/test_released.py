"""Released state dicts: round trips, errors that name entries, shards, torch files."""

import dataclasses
import json
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from megalodon_jax.config import ModelConfig
from megalodon_jax.errors import ConfigError, StateDictError, TorchFileError
from megalodon_jax.interop.released import (
    config_from_released,
    from_state_dict,
    join_shards,
    read_released_checkpoint,
    released_entries,
    to_state_dict,
)
from megalodon_jax.interop.torch_file import read_torch_file
from megalodon_jax.model import Megalodon
from tests.ablations import VARIANTS
from tests.golden_files import GoldenModel, golden_model
from tests.torch_files import write_torch_file


@pytest.fixture(scope="module")
def golden() -> GoldenModel:
    return golden_model("model_b_all_on")


@pytest.mark.parametrize("name", ["model_a_plain", "model_b_all_on", "model_d_swiglu_L320"])
def test_round_trip_is_exact(name: str):
    golden = golden_model(name)
    written = to_state_dict(golden.build())
    assert written.keys() == golden.state_dict.keys()
    for key, value in golden.state_dict.items():
        np.testing.assert_array_equal(written[key], value, err_msg=key)
        assert written[key].dtype == value.dtype, key


def test_round_trip_with_prior_and_without_affine_norms():
    config = ModelConfig(
        num_layers=2, model_dim=16, z_dim=8, value_dim=16, num_heads=2, ffn_hidden_dim=24,
        cema_ndim=4, chunk_size=8, vocab_size=11, norm_num_groups=4, norm_prior_count=3,
        norm_affine=False,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    outside, per_block = released_entries(config)
    names = {entry.name: entry for entry in outside}
    names |= {entry.name.format(i): entry for i in (0, 1) for entry in per_block}
    state_dict = {
        name: rng.normal(size=entry.shape).astype(np.float32)
        for name, entry in names.items()
        if entry.path
    }
    assert "layers.1.mega.timenorm.prior_mean" in state_dict
    written = to_state_dict(from_state_dict(config, state_dict))
    assert int(written["output.final_norm.prior_count"]) == 3
    for key, value in state_dict.items():
        np.testing.assert_array_equal(written[key], value, err_msg=key)


def test_errors_name_the_entries(golden: GoldenModel):
    broken = dict(golden.state_dict)
    del broken["layers.1.mega.wv.bias"]
    broken["layers.0.nffn.fc1.weight"] = broken["layers.0.nffn.fc1.weight"][:-1]
    broken["layers.7.surprise"] = np.zeros(3)
    with pytest.raises(StateDictError) as caught:
        from_state_dict(config_from_released(golden.meta["config"]), broken)
    message = str(caught.value)
    assert "unknown entries: layers.7.surprise" in message
    assert "missing entries: layers.1.mega.wv.bias" in message
    assert "layers.0.nffn.fc1.weight (159, 64), must be (160, 64)" in message


@pytest.mark.parametrize("name", VARIANTS)
def test_ablations_have_no_released_names(golden: GoldenModel, name: str):
    config = config_from_released(golden.meta["config"], **VARIANTS[name])
    switch = next(iter(VARIANTS[name]))
    with pytest.raises(StateDictError, match=f"{switch} = .* no names for such a model"):
        from_state_dict(config, golden.state_dict)
    with pytest.raises(StateDictError, match=switch):
        to_state_dict(nnx.eval_shape(lambda: Megalodon(config, rngs=nnx.Rngs(0))))


@pytest.mark.parametrize(
    ("change", "name"), [({"rope_base": 10_000.0}, "rope.freqs"), ({}, "output.output.weight")]
)
def test_buffers_that_contradict_the_config(golden: GoldenModel, change: dict, name: str):
    state_dict = dict(golden.state_dict)
    if not change:
        state_dict[name] = state_dict[name] + 1.0
    config = config_from_released(golden.meta["config"], **change)
    with pytest.raises(StateDictError, match=name):
        from_state_dict(config, state_dict)
    del state_dict[name]
    from_state_dict(config, state_dict)


def shard_state_dict(golden: GoldenModel, ranks: int) -> list[dict[str, np.ndarray]]:
    """Shards a state dict like the released column- and row-parallel layers."""
    axis_by_suffix = {
        "embed.weight": 1, "output.output.weight": 1, "wh2.weight": 1, "fc2.weight": 1,
        "mega.gamma": 1, "mega.beta": 1, "rope.freqs": None, "prior_count": None,
        "rmsnorm.weight": None, "nffn.norm.weight": None, "nffn.norm.bias": None,
        "nffn.alpha": None,
    }  # fmt: skip
    shards: list[dict[str, np.ndarray]] = [{} for _ in range(ranks)]
    for key, value in golden.state_dict.items():
        axis = next((a for s, a in axis_by_suffix.items() if key.endswith(s)), 0)
        values = [value] * ranks if axis is None else np.split(value, ranks, axis)
        for shard, local in zip(shards, values):
            shard[key] = local.copy()
    return shards


def test_shards_are_joined(golden: GoldenModel):
    config = config_from_released(golden.meta["config"])
    joined = join_shards(config, shard_state_dict(golden, 2))
    for key, value in golden.state_dict.items():
        np.testing.assert_array_equal(joined[key], value, err_msg=key)

    shards = shard_state_dict(golden, 2)
    shards[1]["layers.0.nffn.alpha"] = shards[1]["layers.0.nffn.alpha"] + 1
    with pytest.raises(StateDictError, match=r"layers\.0\.nffn\.alpha"):
        join_shards(config, shards)
    del shards[1]["layers.0.nffn.alpha"]
    with pytest.raises(StateDictError, match=r"shard 1 and shard 0.*layers\.0\.nffn\.alpha"):
        join_shards(config, shards)


def test_released_checkpoint_directory_without_torch(golden: GoldenModel, tmp_path):
    config_table = {"model": golden.meta["config"], "model_parallel_size": 2}
    (tmp_path / "config.json").write_text(json.dumps(config_table))
    for rank, shard in enumerate(shard_state_dict(golden, 2)):
        # A transposed view: torch files store strides.
        shard["layers.0.mega.wv.weight"] = np.asfortranarray(shard["layers.0.mega.wv.weight"])
        shard["layers.1.mega.wv.bias"] = shard["layers.1.mega.wv.bias"].astype(ml_dtypes.bfloat16)
        write_torch_file(tmp_path / f"consolidated.{rank:02d}.pth", shard)
    config, state_dict = read_released_checkpoint(tmp_path)
    assert config == config_from_released(golden.meta["config"])
    for key, value in golden.state_dict.items():
        rounded = key == "layers.1.mega.wv.bias"
        expected = value.astype(ml_dtypes.bfloat16) if rounded else value
        np.testing.assert_array_equal(state_dict[key], expected, err_msg=key)
    from_state_dict(config, state_dict)


def test_a_torch_file_that_would_execute_code_is_rejected(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (print, ("gotcha",))

    with zipfile.ZipFile(tmp_path / "bad.pth", "w") as archive:
        archive.writestr("bad/data.pkl", pickle.dumps({"weight": Malicious()}))
    with pytest.raises(TorchFileError, match="print"):
        read_torch_file(tmp_path / "bad.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(TorchFileError, match=r"text\.pth is not in the zip format of torch\.save"):
        read_torch_file(tmp_path / "text.pth")
    with pytest.raises(TorchFileError, match="cannot read"):
        read_torch_file(tmp_path / "absent.pth")


def test_config_from_released(golden: GoldenModel):
    config = config_from_released(golden.meta["config"])
    assert config.rope_base == 100_000.0
    assert config.share_emb
    assert config.output_size is None
    assert dataclasses.replace(config, dropout=0.0) == config
    plain = config_from_released(golden_model("model_a_plain").meta["config"])
    assert plain.rope_base == 10_000.0
    with pytest.raises(ConfigError, match="moe"):
        config_from_released({**golden.meta["config"], "moe": 8})
