"""`bench train` runs, reports what it promises, and knows kernels by their names."""

import json

import jax
import pytest

from megalodon_jax.bench.kernel_times import kernel_times, kind_of
from megalodon_jax.bench.train import CASES, time_step
from megalodon_jax.config import DataConfig, ModelConfig, TrainConfig
from megalodon_jax.training.cli import main


def test_time_step():
    model = ModelConfig(
        num_layers=1, model_dim=16, z_dim=8, value_dim=16, ffn_hidden_dim=16, chunk_size=8,
        vocab_size=30, norm_num_groups=4,
    )  # fmt: skip
    config = TrainConfig(model=model, data=DataConfig(batch_size=2, seq_len=16))
    timing = time_step(config, documents=2, steps=2)
    assert timing.tokens_per_second > 0
    assert timing.flops_per_second > 6 * 2 * 30 * 16 * timing.tokens_per_second / 2
    assert timing.argument_bytes > 3 * 4 * (2 * 30 * 16)
    assert timing.peak_bytes > timing.argument_bytes


def test_one_case_from_the_command_line(tmp_path, capsys):
    file = tmp_path / "steps.json"
    arguments = ["--preset", "mega200M", "--documents", "3", "--remat", "inputs", "--steps", "1"]
    assert main(["bench", "train", *arguments, "--small", "--json", str(file)]) == 0
    assert "mega200M (8, 2048) remat inputs, 3 documents a row: " in capsys.readouterr().out
    (step,) = json.loads(file.read_text())["steps"]
    assert step["case"]["documents"] == 3
    assert step["tokens_per_second"] > 0


def test_the_table_can_be_built():
    for case in CASES:
        assert case.config().data.seq_len == case.length


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("chunk_attention_band_product_mosaic_gpu_kernel", "chunk attention"),
        ("cema_outputs_mosaic_gpu_kernel", "CEMA"),
        ("nvjet_sm90_tst_128x128_64x6_2x1_v_bz_TNT", "matrix products"),
        ("MemcpyD2D", "copies"),
        ("loop_add_fusion_3", "other"),
    ],
)
def test_kinds_of_kernels(kernel, kind):
    assert kind_of(kernel) == kind


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU has kernels to show")
def test_no_kernels_without_a_gpu():
    assert kernel_times(lambda: jax.numpy.zeros(3), calls=1) == []
