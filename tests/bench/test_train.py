"""`bench train` reports speed and memory, and sorts kernels by their names."""

import dataclasses
import json

import jax
import pytest

from megalodon_jax.bench import train
from megalodon_jax.bench.kernel_times import kernel_times, kind_of
from megalodon_jax.bench.options import BenchTrainOptions
from megalodon_jax.bench.train import CASES, StepTiming, TrainCase
from megalodon_jax.chips import CHIPS
from megalodon_jax.cli.main import main
from megalodon_jax.plan.machine import Machine


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_transformer_of_the_same_size_is_measured_beside_it(tmp_path, monkeypatch, capsys):
    def time(config, **_):
        if config.model.kind == "transformer" and config.model.remat == "none":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        rate = 1000.0 if config.model.kind == "megalodon" else 800.0
        return StepTiming(rate, 1e9, 2, 1, 0.5, [])

    monkeypatch.setattr(train, "time_step", time)
    file = tmp_path / "steps.json"
    arguments = ["--preset", "mega200M", "--against", "transformer", "--length", "2048", "4096"]
    remat = ["--remat", "none", "dots"]
    assert main(["bench", "train", *arguments, *remat, "--small", "--json", str(file)]) == 0
    cases = [step["case"] for step in json.loads(file.read_text())["steps"]]
    assert [(case["preset"], case["length"], case["remat"]) for case in cases] == [
        ("mega200M", 2048, "none"),
        ("transformer200M", 2048, "dots"),
        ("mega200M", 4096, "none"),
        ("transformer200M", 4096, "dots"),
    ]
    assert capsys.readouterr().out.count("1.25 times the speed of the Transformer") == 2
    assert main(["bench", "train", "--preset", "mega1.3B_pg19", "--against", "transformer"]) == 2
    assert "no Transformer has the size of 'mega1.3B_pg19'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_transformer_step_runs_on_this_device():
    case = dataclasses.replace(TrainCase("transformer200M", 8, 2048), documents=3, scan_layers=True)
    timing = train.time_step(train.small(case.config()), documents=3, steps=1)
    assert timing.tokens_per_second > 0


def test_implementation_is_that_of_the_model_but_not_of_the_transformer():
    case = train.TrainCase("mega200M", 8, 2048, implementation="triton")
    assert case.config().model.implementation == "triton"
    assert str(case).endswith(", triton")
    (opponent,) = train._opponents(case, BenchTrainOptions(against="transformer"))
    assert opponent.implementation is None
    assert opponent.config().model.kind == "transformer"


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


@pytest.mark.slow
def test_a_step_over_a_mesh_beside_its_plan(tmp_path, capsys, monkeypatch, smaller_model):
    monkeypatch.setitem(train.read_plan.__globals__, "describe_machine", describe_cpu_as_h200)
    file = tmp_path / "steps.json"
    arguments = ["--preset", "mega200M", "--mesh.data", "4", "--mesh.chunk", "2", "--steps", "1"]
    arguments += ["--plan", "--small", "--json", str(file)]
    assert main(["bench", "train", *arguments]) == 0
    text = capsys.readouterr().out
    assert "mega200M (8, 2048) remat none, data 4, chunk 2: " in text
    (step,) = json.loads(file.read_text())["steps"]
    assert step["devices"] == 8
    plan = step["plan"]
    assert plan["batch"] == [1, 8, 256]
    assert {total["axes"] for total in plan["collectives"]} >= {"data", "chunk"}
    assert plan["memory"]["temporaries"] > 0
    # A CPU does not count the memory in use.
    assert step["peak_in_use"] is None
    assert f"planned peak {plan['memory']['peak'] / 1e9:.1f} GB, not measured" in text
    assert f"estimated {plan['roofline']['expected'] * 1e3:,.1f} ms, measured " in text


def describe_cpu_as_h200(mesh):
    return Machine(CHIPS["NVIDIA H200"], mesh)
