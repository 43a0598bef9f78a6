"""`bench train` reports speed and memory, and sorts kernels by their names."""

import json

import jax
import pytest

from megalodon_jax.bench import train
from megalodon_jax.bench.kernel_times import kernel_times, kind_of
from megalodon_jax.bench.train import CASES, StepTiming
from megalodon_jax.cli.main import main


@pytest.mark.slow
def test_one_case_from_the_command_line(tmp_path, capsys, smaller_model):
    file = tmp_path / "steps.json"
    arguments = ["--preset", "mega200M", "--documents", "3", "--scan_layers", "--steps", "1"]
    assert main(["bench", "train", *arguments, "--small", "--json", str(file)]) == 0
    assert "mega200M (8, 2048) remat none, 3 documents a row, scanned: " in capsys.readouterr().out
    (step,) = json.loads(file.read_text())["steps"]
    assert step["case"]["documents"] == 3
    assert step["flops_per_second"] > 6 * 256 * 64 * step["tokens_per_second"] > 0
    # Weights and two moments.
    assert step["peak_bytes"] > step["argument_bytes"] > 3 * 4 * (2 * 256 * 64)


@pytest.mark.parametrize(
    ("tokens", "rows"), [("0", [8, 8, 8]), ("32768", [16, 4, 1])], ids=["rows", "tokens"]
)
def test_several_lengths_in_one_call(tmp_path, monkeypatch, tokens, rows):
    timing = StepTiming(1000.0, 1e9, 2, 1, 0.5, [])
    monkeypatch.setattr(train, "time_step", lambda config, **_: timing)
    file = tmp_path / "steps.json"
    lengths = ["--length", "2048", "8192", "65536", "--tokens", tokens]
    arguments = ["--preset", "mega200M", *lengths, "--small", "--json", str(file)]
    assert main(["bench", "train", *arguments]) == 0
    steps = json.loads(file.read_text())["steps"]
    assert [step["case"]["length"] for step in steps] == [2048, 8192, 65_536]
    assert [step["case"]["rows"] for step in steps] == rows
    assert all(step["tokens_per_second"] == 1000.0 for step in steps)


def test_cases_have_their_length():
    for case in CASES:
        assert case.config().data.seq_len == case.length


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("chunk_attention_band_product_mosaic_gpu_kernel", "chunk attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", "cuDNN attention"),
        ("cema_outputs_mosaic_gpu_kernel", "CEMA"),
        ("nvjet_sm90_tst_128x128_64x6_2x1_v_bz_TNT", "matrix products"),
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", "collectives"),
        ("MemcpyD2D", "copies"),
        ("loop_add_fusion_3", "other"),
    ],
)
def test_kinds_of_kernels(kernel, kind):
    assert kind_of(kernel) == kind


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU has kernels to show")
def test_no_kernels_without_a_gpu():
    assert kernel_times(lambda: jax.numpy.zeros(3), calls=1) == []
