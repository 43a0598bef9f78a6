"""LoRA with two processes against one: the same losses, factors and checkpoints."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

import megalodon_jax
from megalodon_jax.checkpoints import RunCheckpoints
from megalodon_jax.config import LoraConfig, MeshConfig
from megalodon_jax.interop.convert import convert
from tests.parallel.test_distributed import _assert_same_metrics, _Launcher, _steps


@pytest.mark.slow
def test_two_processes_train_the_factors_of_one(text_file, tmp_path):
    one = _Launcher(tmp_path, text_file, num_processes=1)
    two = _Launcher(tmp_path, text_file, num_processes=2)
    lora = {
        "init_from": str(tmp_path / "base"), "lora": LoraConfig(rank=2, dropout=0.1),
        "num_shards": 2,
    }  # fmt: skip
    one.run(one.config("base"), one.config("one", **lora))
    two.run(two.config("two", **lora))
    _assert_same_metrics(tmp_path / "two", tmp_path / "one")
    # Two processes go on from the checkpoint of one, with a copy of the base in a file.
    shutil.copytree(tmp_path / "one" / "checkpoints" / "3", tmp_path / "both" / "checkpoints" / "3")
    convert(tmp_path / "base", tmp_path / "base.safetensors")
    resumed = two.config("both", **{**lora, "init_from": str(tmp_path / "base.safetensors")})
    two.run(dataclasses.replace(resumed, resume=True))
    assert _steps(tmp_path / "both") == [3, 6]
    _assert_same_metrics(tmp_path / "both", tmp_path / "one", after=3)
    models = [megalodon_jax.load(tmp_path / name).model for name in ("one", "two", "both")]
    weights = [jax.tree.leaves(nnx.state(model)) for model in models]
    for a, *others in zip(*weights, strict=True):
        for other in others:
            np.testing.assert_allclose(other, a, rtol=1e-5, atol=1e-6)
    with RunCheckpoints(tmp_path / "both", read_only=True) as checkpoints:
        restored = checkpoints.restore(6, dataclasses.replace(resumed, mesh=MeshConfig()))
    assert restored.base is not None
    assert restored.base.path == str(tmp_path / "base.safetensors")
