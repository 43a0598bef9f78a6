"""`bench ops`: all gradients, the least work, errors, and every refusal are measured."""

import dataclasses
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
import pytest

from megalodon_jax.bench import ops
from megalodon_jax.bench.ceilings import Ceilings, measure_ceilings
from megalodon_jax.bench.op_cases import (
    CASES,
    SMALL_CASES,
    CemaCase,
    ChunkAttentionCase,
    NoncausalAttentionCase,
    RowwiseCase,
    TimestepNormCase,
)
from megalodon_jax.bench.options import BenchMode
from megalodon_jax.bench.timing import seconds_per_call
from megalodon_jax.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
CEILINGS = Ceilings(bytes_per_second=1e9, flops_per_second=1e12)
TINY = {
    "cema": CemaCase(2, 24, channels=4, order=2),
    "timestep_norm": TimestepNormCase(2, 24, channels=4, groups=2),
    "chunk_attention": ChunkAttentionCase(2, 24, heads=2, key_width=4, value_width=6, chunk_size=5),
    "noncausal_attention": NoncausalAttentionCase(
        2, 24, heads=2, key_width=4, value_width=6, chunk_size=5
    ),
    "rowwise": RowwiseCase(2, 24, channels=4, function="layer_norm"),
}


def seeded(seed=0):
    return np.random.default_rng(seed)


def measured(case, mode, implementation) -> list[Any]:
    inputs = case.make_inputs(seeded(), mode, "initial")
    cotangents = ops.make_cotangents(case, inputs, seeded())
    return list(
        ops.measure(case, mode, implementation, CEILINGS, inputs=inputs, cotangents=cotangents)
    )


def least_work(row):
    assert row.rate is not None
    assert row.seconds is not None
    return row.rate * row.seconds


def test_seconds_per_call_is_that_of_one_call():
    calls = []

    def slow(value):
        calls.append(value)
        time.sleep(0.01)
        return value

    assert 0.01 <= seconds_per_call(slow, 3, repeats=3) < 0.1
    assert set(calls) == {3}


def test_ceilings_are_rates_of_this_machine():
    ceilings = measure_ceilings(copied_bytes=2**22, matrix_size=64)
    assert 1e7 < ceilings.bytes_per_second < 1e14
    assert 1e5 < ceilings.flops_per_second < 1e16


@pytest.mark.parametrize(("op", "mode"), [(op, mode) for op in TINY for mode in TINY[op].modes])
def test_errors_of_every_result_and_gradient(op, mode):
    checked = ops.make_checked(TINY[op], mode, "initial", seeded())
    errors = ops.measure_errors(checked, "xla")
    results, gradients = errors["forward"], errors["forward+backward"]
    expected = {
        "cema": ["x", "alpha", "delta", "theta", "gamma", "omega"],
        "timestep_norm": ["x", "scale", "bias"],
        "chunk_attention": ["q", "k", "v"],
        "noncausal_attention": ["q", "k", "v"],
        "rowwise": ["x", "added", "scale", "bias", "offset"],
    }[op]
    if mode == "carried":
        expected += {
            "cema": ["initial_state"],
            "timestep_norm": ["mean", "var"],
            "chunk_attention": ["cache.key", "cache.value"],
        }[op]
    assert {name.removeprefix("params.") for name in gradients} == set(expected)
    assert len(results) == 1 + len(expected) - {"cema": 6, "rowwise": 5}.get(op, 3)
    for name, error in (results | gradients).items():
        rounded = name in ("x", "added", "y", "out") or op.endswith("attention")
        # bfloat16 rounds by up to 2^-9; attention rounds its weights too.
        assert error < (1e-2 if rounded else 1e-5), name
        assert error > 1e-4 or not rounded, name
    # No expected result is zero.
    assert all(np.any(leaf) for leaf in jax.tree.leaves(checked.expected))


def test_an_error_is_seen():
    class Wrong(CemaCase):
        def apply(self, differentiable, fixed, implementation):
            results = super().apply(differentiable, fixed, implementation)
            if implementation == "reference":
                return results
            return {"y": results["y"] + 0.1 * differentiable["params"].omega.astype("bfloat16")}

    checked = ops.make_checked(Wrong(1, 24, channels=4), "plain", "initial", seeded())
    errors = ops.measure_errors(checked, "xla")
    assert errors["forward"]["y"] > 1e-2
    assert errors["forward+backward"]["params.omega"] > 1e-2
    assert errors["forward+backward"]["params.alpha"] < 1e-5


@pytest.mark.parametrize("mode", get_args(BenchMode))
def test_attention_flops_are_those_of_the_pairs(mode):
    case = TINY["chunk_attention"]
    fixed = case.make_inputs(seeded(), mode, "initial").fixed
    pairs = 0
    for row in range(case.rows):
        documents = fixed.get("segment_ids", np.ones((case.rows, case.length), int))[row].tolist()
        first = case.chunk_size // 2 if mode == "carried" else 0
        previous, position = None, 0
        for document in documents:
            position = position + 1 if document == previous else first
            previous = document
            start_of_chunk = position - position % case.chunk_size
            pairs += len(range(start_of_chunk, position + 1))
    assert case.forward_flops(fixed) == pairs * case.heads * 2 * (4 + 6)
    forward, both = measured(case, mode, "xla")
    assert least_work(forward) == pytest.approx(pairs * case.heads * 20)
    assert least_work(both) == pytest.approx(3 * pairs * case.heads * 20)
    assert forward.share * CEILINGS.flops_per_second == pytest.approx(forward.rate)


@pytest.mark.parametrize("mode", ["plain", "packed"])
def test_non_causal_attention_flops_are_those_of_the_pairs(mode):
    case = TINY["noncausal_attention"]
    fixed = case.make_inputs(seeded(), mode, "initial").fixed
    ids = fixed.get("segment_ids", np.ones((2, 24), int))
    chunks = np.asarray(fixed.get("positions", np.tile(np.arange(24), (2, 1)))) // 5
    sees = (ids[:, :, None] == ids[:, None]) & (chunks[:, :, None] == chunks[:, None])
    assert case.forward_flops(fixed) == sees.sum() * case.heads * 2 * (4 + 6)


def test_least_bytes():
    forward, both = measured(TINY["cema"], "carried", "xla")
    activations, state = 2 * 24 * 4 * 2, 2 * 4 * 2 * 8
    parameters = 4 * (4 * 2 * 4 + 4 + 4)
    least = 2 * activations + 2 * state + parameters
    assert least_work(forward) == pytest.approx(least)
    # Again x, the state and the parameters, dy and dstate; and the gradients of the first three.
    backward = least + activations + state + parameters
    assert least_work(both) == pytest.approx(least + backward)
    assert both.share * CEILINGS.bytes_per_second == pytest.approx(both.rate)
    assert forward.extra_bytes >= activations + state
    assert both.extra_bytes >= 2 * activations + 2 * state + parameters
    assert both.compile_seconds > 0


def test_eight_documents_fill_a_row():
    case = dataclasses.replace(TINY["cema"], rows=3)
    first, second = (
        case.make_inputs(seeded(seed), "packed", "initial").fixed["segment_ids"] for seed in (0, 1)
    )
    for row in first:
        assert np.unique(row).tolist() == list(range(1, 9))
        assert (np.diff(row) >= 0).all()
    assert not np.array_equal(first, second)


def test_cema_params_are_the_models_or_have_a_long_decay():
    from flax import nnx

    from megalodon_jax.modules import CEMA

    D, N = 512, 16
    module = CEMA(D, order=N, rngs=nnx.Rngs(0))
    case = CemaCase(1, 1, channels=D)
    initial = case.make_inputs(seeded(), "plain", "initial").differentiable["params"]
    for name, value in initial._asdict().items():
        expected = np.asarray(getattr(module, name)[...])
        assert value.shape == expected.shape
        assert value.dtype == expected.dtype
        np.testing.assert_allclose(value.mean(), expected.mean(), atol=0.05)
        np.testing.assert_allclose(value.std(), expected.std(), rtol=0.05)
    np.testing.assert_allclose(np.sort(initial.theta), np.sort(module.theta[...]), rtol=1e-4)
    assert not initial.gamma[..., 1].any()

    long = case.make_inputs(seeded(), "plain", "long").differentiable["params"]
    decay = jax.nn.sigmoid(long.alpha) * jax.nn.sigmoid(long.delta)
    assert 1e-3 <= decay.min() * (1 + 1e-4) < 1.1e-3
    assert decay.max() < 0.11


@pytest.mark.parametrize("error", [ValueError, NotImplementedError])
def test_a_refusal_is_shown_with_its_reason(error):
    class Picky(CemaCase):
        def apply(self, differentiable, fixed, implementation):
            raise error("needs L % 128 == 0\nand more")

    inputs = TINY["cema"].make_inputs(seeded(), "plain", "initial")
    for row in ops.measure(
        Picky(1, 24, channels=4), "plain", "xla", CEILINGS, inputs=inputs, cotangents={}
    ):
        assert row.seconds is None
        assert f"{error.__name__}: needs L % 128 == 0" in ops.format_row(row)


@pytest.mark.slow
def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ops, "SMALL_CASES", tuple(TINY.values()))
    file = tmp_path / "ops.json"
    arguments = [
        "--small",
        "--op",
        "timestep_norm",
        "--implementation",
        "reference",
        "xla",
        "--mode",
        "packed",
        "--check",
        "--json",
        str(file),
    ]
    assert main(["bench", "ops", *arguments]) == 0
    report = json.loads(file.read_text())
    rows = {(row["implementation"], row["direction"]): row for row in report["measurements"]}
    assert len(rows) == len(report["measurements"]) == 2 * 2
    assert all(math.isfinite(row["seconds"]) and row["errors"] for row in rows.values())
    assert rows["xla", "forward"]["errors"]["y"] < 5e-3
    out = capsys.readouterr().out
    assert f"seed {report['seed']}" in out
    assert out.count("GB/s") == 1 + len(rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: megalodon bench"),
        (["opps"], "did you mean 'ops'"),
        (["ops", "--op", "fft"], "fft"),
        (["ops", "--implementation", "cuda"], "cuda"),
        (["ops", "--op", "rowwise", "--implementation", "pallas_tpu"], "no implementation pallas"),
    ],
)
def test_mistakes(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.out + captured.err


def test_every_operation_is_measured():
    packages = {path.parent.name for path in (ROOT / "pallas_kernels").glob("*/api.py")}
    # Single tokens are measured by `bench decode` and `bench decode_kernels`.
    packages -= {"chunk_decode", "norm_state_step", "skinny_matmul", "state_step"}
    for cases in (CASES, SMALL_CASES, TINY.values()):
        # Non-causal attention is a call of chunk attention.
        assert {case.op for case in cases} == packages | {"noncausal_attention"}
    assert len({(case.op, str(case)) for case in CASES}) == len(CASES)
    for case in CASES:
        assert {"reference", "xla"} <= set(case.implementations)


@pytest.mark.slow
def test_runs_with_jax_and_numpy_alone():
    """On a GPU machine that has no more than that; `megalodon_jax` itself imports Flax."""
    program = """
import sys, types
for name in ("flax", "rich", "tyro", "cattrs", "optax", "orbax", "grain"):
    sys.modules[name] = None
package = types.ModuleType("megalodon_jax")
package.__path__ = ["megalodon_jax"]
sys.modules["megalodon_jax"] = package
from megalodon_jax.bench import ops
from megalodon_jax.bench.options import BenchOpsOptions
ops.SMALL_CASES = (ops.SMALL_CASES[-1],)
raise SystemExit(ops.run(BenchOpsOptions(small=True, implementation=("xla",))))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "silu_gate" in done.stdout


def test_options_import_nothing_heavy():
    program = """
import sys, types
for name in ("jax", "flax", "numpy", "tyro"):
    sys.modules[name] = None
package = types.ModuleType("megalodon_jax")
package.__path__ = ["megalodon_jax"]
sys.modules["megalodon_jax"] = package
import megalodon_jax.bench.options, megalodon_jax.plan.options
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
