"""Measures the implementations at a configuration's shapes, and writes the fastest to a file.

    megalodon tune my_run.toml

`pallas_kernels` reads the file (`common.measured_choice`) where a call names no implementation. An
implementation that fails, or is further from the float64 reference than plain JAX is by its
rounding, is never chosen. Everything is measured in bfloat16, forward and backward together.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from megalodon_jax.bench.ceilings import measure_ceilings
from megalodon_jax.bench.op_cases import (
    CemaCase,
    ChunkAttentionCase,
    NoncausalAttentionCase,
    OpCase,
    RowwiseCase,
    TimestepNormCase,
)
from megalodon_jax.bench.ops import make_checked, make_cotangents, measure, measure_errors
from megalodon_jax.bench.options import BenchMode
from megalodon_jax.config import EncoderConfig, ModelConfig, TrainConfig
from megalodon_jax.errors import ConfigError
from pallas_kernels.common.dispatch import Implementation
from pallas_kernels.common.measured_choice import MeasuredChoice, write_choices

# An error may be this many times that of plain JAX, or this much larger: bfloat16 rounds results to
# 1.7e-3.
ERROR_FACTOR, ERROR_MARGIN = 3.0, 1e-3
# Errors are measured on a few rows of few tokens.
CHECKED_ROWS, CHECKED_LENGTH = 2, 512


class Candidate(NamedTuple):
    """One implementation of an operation.

    Attributes:
      implementation: its name.
      seconds: of a forward and backward pass; None if it did not run.
      error: largest relative error of a result or gradient; None if it did not run.
      verdict: "ok", "wrong", or the reason why it did not run.
    """

    implementation: Implementation
    seconds: float | None
    error: float | None
    verdict: str


def tuned_cases(config: TrainConfig) -> list[tuple[str, int, OpCase]]:
    """Operation, width and case of everything that one device computes in a training step.

    Raises:
      ConfigError: a kind of model without these operations.
    """
    model, mesh = config.model, config.mesh
    if not isinstance(model, ModelConfig | EncoderConfig):
        raise ConfigError(
            f"model.kind is {model.kind!r}; only MEGALODON and encoders have operations to tune"
        )
    rows = max(1, config.data.batch_size // max(1, mesh.replica * mesh.data))
    length = max(2, config.data.seq_len // max(1, mesh.chunk))
    D, value_width = model.model_dim, model.value_dim // model.num_heads
    chunk_size = min(model.chunk_size or length, length)
    cases: list[tuple[str, int, OpCase]] = [("cema", D, CemaCase(rows, length, D, model.cema_ndim))]
    if model.time_norm == "timestep" and model.norm_num_groups is not None:
        norm = TimestepNormCase(rows, length, D, model.norm_num_groups)
        cases.append(("timestep_norm", D, norm))
    # Without chunks a causal encoder chooses as a non-causal one does.
    is_causal = isinstance(model, ModelConfig) or (model.causal and model.chunk_size is not None)
    attention = (ChunkAttentionCase if is_causal else NoncausalAttentionCase)(
        rows, length, model.num_heads, model.z_dim // model.num_heads, value_width, chunk_size
    )
    cases.append((attention.op, value_width, attention))
    gate_width = model.value_dim
    cases.append(("rms_norm", D, RowwiseCase(rows, length, D, "rms_norm")))
    cases.append(("layer_norm", D, RowwiseCase(rows, length, D, "layer_norm")))
    cases.append(("silu", gate_width, RowwiseCase(rows, length, gate_width, "silu")))
    cases.append(("silu_gate", gate_width, RowwiseCase(rows, length, gate_width, "silu_gate")))
    return cases


def tune(config: TrainConfig) -> list[MeasuredChoice]:
    """Measures, prints a table, and returns the fastest implementation of every operation."""
    rng = np.random.default_rng(0)
    choices = []
    for operation, width, case in tuned_cases(config):
        mode: BenchMode = "packed" if config.data.packing == "pack" else "plain"
        mode = mode if mode in case.modes else case.modes[0]
        print(f"\n{operation}  {case}  {mode}", flush=True)
        candidates = []
        for candidate in measure_candidates(case, mode, rng):
            candidates.append(candidate)
            print(format_candidate(candidate), flush=True)
        best = choose(candidates)
        if best is not None:
            print(f"  fastest: {best}")
            tokens = case.rows * case.length
            choices.append(MeasuredChoice(operation, "bfloat16", width, tokens, best))
    return choices


def measure_candidates(
    case: OpCase, mode: BenchMode, rng: np.random.Generator
) -> Iterator[Candidate]:
    """Plain JAX first, which the others are compared with."""
    ceilings = measure_ceilings(copied_bytes=2**20, matrix_size=128)
    names: list[Any] = [name for name in case.implementations if name != "reference"]
    names.sort(key=lambda name: name != "xla")
    sizes = {"rows": min(case.rows, CHECKED_ROWS), "length": min(case.length, CHECKED_LENGTH)}
    if isinstance(case, ChunkAttentionCase):
        sizes["chunk_size"] = min(case.chunk_size, CHECKED_LENGTH // 2)
    short = dataclasses.replace(case, **sizes)
    checked = make_checked(short, mode, "initial", rng)
    inputs = case.make_inputs(rng, mode, "initial")
    cotangents = make_cotangents(case, inputs, rng)
    expected: dict[str, float] = {}
    for name in names:
        try:
            *_, row = measure(case, mode, name, ceilings, inputs=inputs, cotangents=cotangents)
            with contextlib.redirect_stdout(None):
                found = measure_errors(checked, name)
        except (ValueError, RuntimeError) as error:
            yield Candidate(name, None, None, str(error).splitlines()[0])
            continue
        errors = {key: error for part in found.values() for key, error in part.items()}
        if row.seconds is None or not errors:
            yield Candidate(name, None, None, row.reason or "refuses the short case")
            continue
        expected = expected or errors
        worst = max(errors.values())
        agrees = all(
            error <= ERROR_FACTOR * expected[key] + ERROR_MARGIN for key, error in errors.items()
        )
        yield Candidate(name, row.seconds, worst, "ok" if agrees else "wrong")


def choose(candidates: list[Candidate]) -> Implementation | None:
    """The fastest of those that are right; None if none is."""
    right = [each for each in candidates if each.verdict == "ok" and each.seconds is not None]
    return min(right, key=lambda each: each.seconds or 0.0).implementation if right else None


def format_candidate(candidate: Candidate) -> str:
    """One line of the table."""
    if candidate.seconds is None or candidate.error is None:
        return f"  {candidate.implementation:12} {candidate.verdict}"
    return (
        f"  {candidate.implementation:12} {candidate.seconds * 1e3:9.3f} ms  "
        f"error {candidate.error:.1e}  {candidate.verdict}"
    )


def run(config: TrainConfig) -> int:
    """Measures, writes the file and says where it is."""
    kind = jax.devices()[0].device_kind
    print(f"{kind}, jax {jax.__version__}: forward + backward, bfloat16, relative errors")
    choices = tune(config)
    file = write_choices(kind, choices)
    print(f"\nwritten to {file}; `megalodon tune --reset` removes it")
    print('`model.implementation = "xla"` in a configuration overrides it')
    print("An implementation that is wrong here is a bug: please report this table.")
    return 0
