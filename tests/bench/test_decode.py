"""`bench decode`: bytes, medians and launches by their definitions; every table on a CPU."""

import json
import math

import jax
import pytest
from flax import nnx

from megalodon_jax.bench import decode, decode_memory
from megalodon_jax.bench.decode_bytes import (
    cache_slots,
    mean_fill,
    num_bytes,
    row_bytes,
    step_bytes,
    token_bytes,
)
from megalodon_jax.bench.decode_memory import grouped_queries, measure_context
from megalodon_jax.bench.decode_steps import BenchModel, Chain, seconds_per_step
from megalodon_jax.bench.kernel_times import kind_of
from megalodon_jax.cli.main import main
from megalodon_jax.compiled.hlo import parse_program
from megalodon_jax.compiled.launches import count_launches
from megalodon_jax.config import TransformerConfig, model_preset
from megalodon_jax.inference.decoders import prepare_decoding
from megalodon_jax.models import abstract_model

# Gigabytes of a step by the formula 2 (matrices + V D) + B [layers fill (Z + E) 2 + 2 layers D N 8
# + 8 V] with 1,152 filled slots, in bfloat16, worked out by hand for the two sizes.
COST_MODEL = {
    "mega200M": {1: 0.444, 8: 0.914, 64: 4.67, 256: 17.6},
    "mega1.3B": {1: 2.83, 8: 4.70, 64: 19.7, 256: 71.1},
}
CHAIN = Chain(length=4)


def shapes(config, weights="model", *, max_length=None, **options):
    """Prepared weights and a cache of two rows, as shapes."""
    graphdef, params = abstract_model(config)
    return jax.eval_shape(
        lambda params: (
            prepare_decoding(nnx.merge(graphdef, params), weights),
            nnx.merge(graphdef, params).init_cache(2, max_length=max_length, **options),
        ),
        params,
    )


@pytest.mark.parametrize("preset", COST_MODEL)
def test_bytes_of_a_step_are_those_of_the_cost_model(preset):
    weights, cache = shapes(model_preset(preset, dtype="bfloat16"))
    for rows, gigabytes in COST_MODEL[preset].items():
        found = step_bytes(weights, cache, rows=rows, fill=1152)
        # Norms, biases and CEMA's tables are 0.4 % more.
        assert found.total == pytest.approx(gigabytes * 1e9, rel=7e-3)
        assert found.states >= 2 * rows * weights.config.num_layers * weights.config.model_dim * (
            8 * weights.config.cema_ndim
        )


def test_int8_halves_the_matrices_and_nothing_else():
    config = model_preset("mega200M", dtype="bfloat16")
    wide, cache = shapes(config)
    narrow, _ = shapes(config, "int8")
    before, after = (step_bytes(w, cache, rows=8, fill=1152) for w in (wide, narrow))
    matrices = 2 * (before.weights - after.weights)
    assert matrices == pytest.approx(0.374e9, rel=1e-2)
    assert before[1:] == after[1:]


def test_int8_keys_and_values_have_half_the_bytes_and_two_scales():
    """mega200M, 12 layers of one head: 256 + 2,048 numbers of a token."""
    config = model_preset("mega200M", dtype="bfloat16")
    weights, wide = shapes(config)
    _, narrow = shapes(config, kv="int8")
    assert token_bytes(wide) == 12 * 2 * 2304
    assert token_bytes(narrow) == 12 * (2304 + 2 * 4)
    assert row_bytes(wide) - row_bytes(narrow) == 2048 * (token_bytes(wide) - token_bytes(narrow))
    before, after = (step_bytes(weights, cache, rows=8, fill=1152) for cache in (wide, narrow))
    assert after.keys_and_values == 8 * 1152 * token_bytes(narrow)
    assert before._replace(keys_and_values=0) == after._replace(keys_and_values=0)


def test_a_transformer_reads_the_slots_of_its_context():
    full = model_preset("transformer200M", dtype="bfloat16")
    assert isinstance(full, TransformerConfig)
    grouped = grouped_queries(full)
    assert grouped.kv_heads == 2
    for config in (full, grouped):
        weights, cache = shapes(config, max_length=4096)
        assert cache_slots(cache) == 4096
        assert token_bytes(cache) == 12 * 2 * config.kv_heads * 128 * 2
        assert row_bytes(cache) == 4096 * token_bytes(cache)
        found = step_bytes(weights, cache, rows=3, fill=4000)
        assert found.keys_and_values == 3 * 4000 * token_bytes(cache)
        assert found.states == 0
        # One row of the embedding is read for each token, in the dtype in which it is kept.
        assert found.weights == num_bytes(weights) - 32_000 * 1024 * 2


def test_a_tied_embedding_is_read_whole():
    config = model_preset("transformer30M", dtype="bfloat16", share_emb=True)
    weights, cache = shapes(config, max_length=128)
    found = step_bytes(weights, cache, rows=1, fill=1)
    assert (found.weights, found.embedding) == (num_bytes(weights), 0)


@pytest.mark.parametrize(
    ("position", "steps", "slots", "filled"),
    [
        (1024, 256, 2048, 1152.5),
        (0, 1, 16, 1.0),
        (13, 5, 16, (14 + 15 + 16 + 1 + 2) / 5),
        (100, 32, 16, 8.5),
    ],
)
def test_filled_slots(position, steps, slots, filled):
    assert mean_fill(position, steps, slots) == pytest.approx(filled)


def test_the_time_of_a_step_is_a_median_of_differences():
    # One slow short chain and one slow long chain change nothing.
    short = [1.0, 1.0, 9.0, 1.0, 1.0]
    long = [8.0, 8.0, 16.0, 80.0, 8.0]
    assert seconds_per_step(short, long, 7) == pytest.approx(1.0)
    assert (Chain().first, Chain().steps, Chain().length * Chain().long) == (32, 224, 256)


PROGRAM = """HloModule block

%inner (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %n = f32[4]{0} negate(%p)
  ROOT %e = f32[4]{0} exponential(%n)
}

%body (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %s = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[4]{0} get-tuple-element(%s), index=1
  %f = f32[4]{0} fusion(%x), kind=kLoop, calls=%inner
  %k = f32[4]{0} custom-call(%f), custom_call_target="mosaic_gpu_v2"
  %c = f32[4]{0} copy(%k)
  ROOT %t = (s32[], f32[4]{0}) tuple(%i, %c)
}

%condition (s: (s32[], f32[4])) -> pred[] {
  %s = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] constant(8)
  ROOT %l = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %s = (s32[], f32[4]{0}) parameter(0)
  %x = f32[4]{0} get-tuple-element(%s), index=1
  %before = f32[4]{0} fusion(%x), kind=kLoop, calls=%inner
  %i = s32[] constant(0)
  %t = (s32[], f32[4]{0}) tuple(%i, %before)
  ROOT %w = (s32[], f32[4]{0}) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"8"}}
}
"""  # noqa: E501


def test_launches_of_one_step_of_a_loop():
    # The fusion, the kernel and the copy; the comparison that ends the loop is a launch too.
    assert count_launches(parse_program(PROGRAM), iterations=8) == 4
    assert count_launches(parse_program(PROGRAM)) == 8 * 3 + 9 + 1


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [("chunk_decode_mosaic_gpu_kernel", "chunk decoding"), ("state_step_kernel", "CEMA step")],
)
def test_kernels_of_decoding_have_kinds(kernel, kind):
    assert kind_of(kernel) == kind


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "8", "0"], "--batch has 0; use numbers of at least 1"),
        (["--repeats", "0"], "--repeats has 0"),
        (["--preset", "transformer200M"], "measure it with --against transformer"),
        (
            ["--preset", "mega1.3B_pg19", "--against", "transformer"],
            "no Transformer has the size of 'mega1.3B_pg19'",
        ),
        (
            ["--against", "transformer", "--against_contexts", "256"],
            "--against_contexts has 256; use more than the 256 steps of a chain",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(capsys, arguments, message):
    assert main(["bench", "decode", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def tiny_transformer():
    return BenchModel.make(decode.bench_config("transformer30M", "float32", is_small=True))


def measure(model, **options):
    sizes = {"context": 200, "batch": 1, "limit": None} | options
    return measure_context("tiny", model, chain=CHAIN, repeats=2, bytes_per_second=1e9, **sizes)


@pytest.mark.slow
def test_a_context_by_declaration(tiny_transformer):
    row = measure(tiny_transformer)
    config = tiny_transformer.model.config
    # Slots are a multiple of 128; the timed steps are the last 28 of the context.
    size = 2 * config.num_layers * config.kv_heads * config.head_dim * 4
    assert (row.context, row.row_bytes, row.rows_that_fit) == (200, 256 * size, None)
    assert (row.step.batch, row.step.slots, row.step.position) == (1, 2, 168)
    assert row.step.fill == sum(range(173, 201)) / 28
    assert row.step.seconds is not None
    assert row.step.seconds > 0
    assert row.step.floor_seconds == row.step.bytes / 1e9
    assert row.step.kernels > 0


def test_contexts_that_do_not_fit_are_reported(tiny_transformer):
    weights = num_bytes(tiny_transformer.weights)
    size = measure(tiny_transformer, limit=0).row_bytes
    row = measure(tiny_transformer, batch=3, limit=weights + 2 * size + size // 2)
    assert (row.rows_that_fit, row.step.seconds) == (2, None)
    assert row.step.reason is not None
    assert row.step.reason.startswith("3 rows need")
    # One row runs without an idle neighbour where two do not fit.
    alone = measure(tiny_transformer, limit=weights + size)
    assert (alone.rows_that_fit, alone.step.slots) == (1, 1)


@pytest.mark.slow
def test_every_table_from_the_command_line(tmp_path, capsys, monkeypatch, smaller_model):
    monkeypatch.setattr(decode_memory, "memory_limit", lambda: 2**30)
    monkeypatch.setattr(decode, "memory_limit", lambda: 2**30)
    file = tmp_path / "decode.json"
    arguments = ["--small", "--batch", "3", "--prompt", "20", "--contexts", "128", "--repeats", "2"]
    arguments += ["--context_batch", "1", "--lengths", "70", "--weights", "model", "int8"]
    arguments += ["--against", "transformer", "--against_contexts", "200", "--profile"]
    assert main(["bench", "decode", *arguments, "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    steps = [
        (row["weights"], row["batch"], row["slots"], row["position"]) for row in report["steps"]
    ]
    assert steps == [
        (weights, batch, slots, position)
        for weights in ("model", "int8")
        for batch, slots, position in ((1, 2, 20), (1, 2, 148), (3, 3, 20))
    ]
    for row in report["steps"]:
        assert row["seconds"] > 0
        assert row["tokens_per_second"] == pytest.approx(row["batch"] / row["seconds"])
        floor = row["bytes"] / report["bytes_per_second"]
        assert row["times_floor"] == pytest.approx(row["seconds"] / floor)
        assert row["kernels"] > 10
        assert row["temporaries"] > 0
    # The fill is the same after the prompt alone and after whole chunks before it.
    assert report["steps"][0]["fill"] == report["steps"][1]["fill"] == 20 + (5 + 32) / 2
    assert [(row["prompt"], row["known"]) for row in report["first_tokens"]] == [(20, 0), (80, 64)]
    (prefill,) = report["prefill"]
    assert prefill["tokens_per_second"] == pytest.approx(70 / prefill["seconds"])
    assert prefill["ratio"] == pytest.approx(prefill["whole_seconds"] / prefill["seconds"])
    models = [row["step"]["model"] for row in report["contexts"]]
    assert models == ["mega200M", "transformer200M", "transformer200M, kv_heads 1"]
    mega, full, grouped = report["contexts"]
    assert full["row_bytes"] == 2 * grouped["row_bytes"]
    assert mega["rows_that_fit"] == pytest.approx(2**30 / mega["row_bytes"], rel=1e-2)
    assert all(math.isfinite(row["step"]["seconds"]) for row in report["contexts"])
    assert "ms a step" in capsys.readouterr().out
