"""`bench decode_kernels`: the calls of a decoding step, their least bytes, errors and tilings."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from megalodon_jax.bench import chunk_decode_case, decode_kernels, skinny_matmul_cases
from megalodon_jax.bench.ceilings import Ceilings
from megalodon_jax.bench.chunk_decode_case import STEPS, ChunkDecodeCase, neighbouring_tilings
from megalodon_jax.bench.decode import bench_config
from megalodon_jax.bench.decode_kernel_case import KernelErrors, Variant
from megalodon_jax.bench.skinny_matmul_cases import product_cases
from megalodon_jax.cli.main import main
from megalodon_jax.compiled.hlo import parse_program
from megalodon_jax.compiled.launches import count_launches
from megalodon_jax.config import ModelConfig
from megalodon_jax.inference import sharded_operations, step
from megalodon_jax.inference.weights import prepare
from megalodon_jax.models import abstract_model
from pallas_kernels.chunk_decode.block_sizes import MAX_SPLITS, choose_tiling
from tests.topologies import compile_for, h200_device

XLA = Variant("xla")


def small_config(**options) -> ModelConfig:
    config = bench_config("mega200M", "bfloat16", is_small=True)
    assert isinstance(config, ModelConfig)
    return dataclasses.replace(config, **{"num_layers": 1, **options})


def products(config, rows=3, weights="model", arrays=1):
    return {case.name: case for case in product_cases(config, rows, weights, arrays)}


@pytest.fixture
def copy_rate(monkeypatch):
    monkeypatch.setattr(decode_kernels, "measure_ceilings", lambda **_: Ceilings(1e9, 1e12))
    return 1e9


def test_command(tmp_path, capsys, copy_rate):
    file = tmp_path / "kernels.json"
    arguments = ["--small", "--rows", "3", "--layers", "1", "--position", "37"]
    assert main(["bench", "decode_kernels", *arguments, "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    out = capsys.readouterr().out.splitlines()
    assert report["bytes_per_second"] == copy_rate
    rows = report["measurements"]
    names = "value", "mixed", "attention output", "FFN input", "FFN output", "logits"
    assert [row["call"].split(",")[0] for row in rows] == ["1 x 32", *names]
    for row in rows:
        assert sum(row["call"] in line and " xla " in line for line in out) == 1
        assert row["clock"] == "host"
        assert math.isfinite(row["seconds"])
        expected = row["least_bytes"] / copy_rate / row["seconds"]
        assert row["share"] == pytest.approx(expected)


def test_an_interrupt_leaves_what_was_measured(tmp_path, capsys, copy_rate, monkeypatch):
    file = tmp_path / "kernels.json"

    def measure(case, variants, rate, check):
        assert variants == [XLA]
        assert rate == copy_rate
        assert check
        yield decode_kernels.KernelMeasurement(
            case.op, case.call, case.rows, case.format, "xla", None, case.arrays, 10,
            seconds=1e-3, clock="kernels", own_seconds=4e-4, launches=3.0, share=0.1,
            errors=KernelErrors(0.25, 7),
        )  # fmt: skip
        raise KeyboardInterrupt

    monkeypatch.setattr(decode_kernels, "measure", measure)
    arguments = ["--small", "--check", "--json", str(file)]
    assert main(["bench", "decode_kernels", *arguments]) == 130
    (row,) = json.loads(file.read_text())["measurements"]
    assert row["errors"] == {"relative": 0.25, "differing": 7}
    assert "1000.00   400.00     3.0  10.0%  2.5e-01, 7 cached" in capsys.readouterr().out


def test_a_refusal_is_shown_with_its_reason():
    """The kernel needs a Hopper GPU."""
    case = products(small_config())["value"]
    (row,) = decode_kernels.measure(case, [Variant("mosaic_gpu")], 1e9, check=True)
    assert row.seconds is None
    assert "ValueError: " in decode_kernels.format_row(row)
    assert "Hopper" in decode_kernels.format_row(row)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "0"], "--rows has 0; use numbers of at least 1"),
        (["--position", "-1"], "--position has -1; use numbers of at least 0"),
        (["--preset", "transformer200M"], "is a Transformer"),
    ],
)
def test_mistakes(arguments, message, capsys):
    assert main(["bench", "decode_kernels", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.out + captured.err


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, "model"),
        ({"swiglu": True, "rescale_nffn": True, "rope_base": None}, "int8"),
        ({"residual_connection": "pre_norm", "num_heads": 2}, "model"),
    ],
)
def test_calls_are_those_of_a_decoding_step(options, weights, monkeypatch):
    config = small_config(**options)
    calls = {"skinny_matmul": [], "chunk_decode": []}

    def describe(arguments):
        return jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype) if isinstance(leaf, jax.Array) else leaf,
            arguments,
        )

    def record(module, name):
        original = getattr(module, name)

        def recorded(*arguments, implementation=None, **rest):
            assert implementation in (None, "xla")
            if name == "skinny_matmul":
                rest = {"weight_sums": None, "norm": None, **rest}
                rest["parts"] = tuple(rest["parts"])
                epilogue = rest["epilogue"]
                rest["epilogue"] = epilogue._replace(added=list(epilogue.added))
            calls[name].append(describe((arguments, rest)))
            return original(*arguments, **rest)

        monkeypatch.setattr(module, name, recorded)

    graphdef, params = abstract_model(config)

    def decode(params):
        model = nnx.merge(graphdef, params)
        cache = model.init_cache(3, kv=weights)
        return step.decode(prepare(model, weights), cache, jnp.zeros(3, jnp.int32))

    record(step, "skinny_matmul")
    record(sharded_operations, "chunk_decode")
    jax.eval_shape(decode, params)
    of_step = {name: list(found) for name, found in calls.items()}
    assert [len(of_step["skinny_matmul"]), len(of_step["chunk_decode"])] == [6, 1]

    record(skinny_matmul_cases, "skinny_matmul")
    record(chunk_decode_case, "chunk_decode")
    calls["skinny_matmul"].clear()
    for case in products(config, weights=weights).values():
        jax.eval_shape(case.program(XLA), *jax.eval_shape(case.make_operands))
    assert calls["skinny_matmul"] == of_step["skinny_matmul"]
    calls["chunk_decode"].clear()
    case = ChunkDecodeCase(config, 3, weights, 70, 1)
    jax.eval_shape(case.program(XLA), *jax.eval_shape(case.make_operands))
    # The loop's body may be traced again.
    assert all(call == of_step["chunk_decode"][0] for call in calls["chunk_decode"])
    assert calls["chunk_decode"]


def test_least_bytes():
    """mega200M at position 1,151 and 8 rows, by hand."""
    config = bench_config("mega200M", "bfloat16", is_small=False)
    Z, E, D, F = 256, 2048, 1024, 2560
    # z twice and rotary factors in float32; v, the gate and the output in bfloat16; the position.
    token = 8 * (4 * 4 * Z + 3 * 2 * E + 4) + 4 * 2 * Z * 4
    for kv, slot in (("model", 2 * (Z + E)), ("int8", Z + E + 2 * 4)):
        case = ChunkDecodeCase(config, 8, kv, 2048 + 1151, 1)
        assert case.array_bytes == 8 * 1152 * slot
        assert case.least_bytes == 8 * 1152 * slot + token
    for weights, matrix in (("model", 2 * D * F), ("int8", D * F + 4 * F)):
        case = products(config, 8, weights)["FFN input"]
        assert case.array_bytes == matrix
        # Float32 rows, the bias, and the output in bfloat16.
        assert case.least_bytes == matrix + 8 * D * 4 + F * 4 + 8 * F * 2


def test_arrays_do_not_fit_into_the_l2_cache():
    config = bench_config("mega200M", "bfloat16", is_small=False)
    options = decode_kernels.BenchDecodeKernelsOptions(rows=(64,), kv=("model", "int8"))
    cases = list(decode_kernels.selected_cases(options, config))
    assert all(case.arrays * case.array_bytes >= 100 * 2**20 for case in cases)
    assert {case.arrays for case in cases if case.op == "chunk_decode"} == {12}


def test_an_error_in_chunk_decoding_is_seen(monkeypatch):
    right = chunk_decode_case.chunk_decode
    case = ChunkDecodeCase(small_config(), 2, "int8", 40, 1)

    def wrong(*arguments, **options):
        out, cache = right(*arguments, **options)
        return out * 1.05, cache._replace(
            key=jax.tree.map(lambda x: x.at[1, 0, 50].set(3), cache.key)
        )

    monkeypatch.setattr(chunk_decode_case, "chunk_decode", wrong)
    found = case.measure_error(XLA)
    assert found.relative > 4e-2
    # One slot of a head, of which few numbers were 3 before; of 8-bit integers also the scale.
    assert 25 <= found.differing <= 33


def test_an_error_in_a_product_is_seen(monkeypatch):
    right = skinny_matmul_cases.skinny_matmul
    case = products(small_config())["mixed"]

    def wrong(*arguments, **options):
        results = right(*arguments, **options)
        return (*results[:-1], results[-1].at[:, :8].set(0))

    # The norm of a bfloat16 row is rounded; nothing else is wrong.
    assert case.measure_error(XLA).relative < 5e-3
    monkeypatch.setattr(skinny_matmul_cases, "skinny_matmul", wrong)
    assert case.measure_error(XLA).relative > 5e-2


def test_tilings_around_the_chosen_ones():
    config = bench_config("mega200M", "bfloat16", is_small=False)
    for rows, kv, itemsize in ((1, "model", 2), (64, "model", 2), (64, "int8", 1)):
        tilings = ChunkDecodeCase(config, rows, kv, 0, 1).tilings()
        chosen = choose_tiling(rows, 2048, 2048, itemsize)
        assert chosen not in tilings
        assert len(tilings) == len(set(tilings)) >= 4
        for tiling in tilings:
            assert tiling.slots_per_block % tiling.slots_per_step == 0
            assert tiling.count_splits(2048) <= MAX_SPLITS
            assert 2048 % tiling.value_tile == 0
    # A chunk of 64 slots is one split; values of 128 columns are one tile.
    only = choose_tiling(2, 64, 128)
    assert {each[:2] for each in neighbouring_tilings(only, 64, 128, 2)} == {(64, 128)}
    for name, case in products(config, 64).items():
        assert case.tilings(), name
    assert not products(config, 16)["value"].tilings()


@pytest.mark.slow
@pytest.mark.parametrize("op", ["chunk_decode", "skinny_matmul"])
def test_programs_for_an_h200_have_no_kernels_but_those_of_the_calls(op):
    config = bench_config("mega200M", "bfloat16", is_small=False)
    cases = {
        "chunk_decode": ChunkDecodeCase(config, 64, "int8", 1151, 2),
        "skinny_matmul": products(config, 64, "int8", arrays=2)["mixed"],
    }
    case = cases[op]
    for tiling in (None, case.tilings()[0]):
        program = compile_for(
            h200_device(),
            case.program(Variant("mosaic_gpu", tiling)),
            *jax.eval_shape(case.make_operands),
            donate_argnums=1,
        )
        launches = count_launches(parse_program(program.as_text()))
        # The splits and their combination; the loop's counter and two small copies.
        expected = 2 * case.calls + 2 * STEPS + 3 if op == "chunk_decode" else case.calls
        assert launches == expected
