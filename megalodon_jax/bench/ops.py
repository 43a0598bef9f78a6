"""Speed, memory and error of every operation's implementations, beside the device's ceilings.

    megalodon bench ops --op cema --check
    megalodon bench ops --small

Measures the forward pass, and forward and backward together (gradients of all inputs, parameters
and states), at the shapes of `op_cases`. A rate counts the least work: for operations that memory
bounds, inputs read and results written once in each direction; for attention, the FLOPs of the
pairs that attend, and twice as many backward. The share is relative to the same device's ceiling,
measured in the same run (`ceilings`); `timing` says how time is measured. `--profile` adds the time
of a call's kernels alone, which decides for calls that are shorter than their launch.
"""

import dataclasses
import json
import secrets
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from megalodon_jax.bench.ceilings import Ceilings, measure_ceilings
from megalodon_jax.bench.kernel_times import kernel_times
from megalodon_jax.bench.op_cases import CASES, SMALL_CASES, Inputs, OpCase
from megalodon_jax.bench.options import BenchMode, BenchOpsOptions, DecayRange
from megalodon_jax.bench.refusals import REFUSALS, first_line
from megalodon_jax.bench.timing import seconds_per_call
from megalodon_jax.compiled.memory import read_memory
from megalodon_jax.errors import ConfigError

Direction = Literal["forward", "forward+backward"]

PROFILED_CALLS = 20


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One row of the table.

    Attributes:
      op: name of the operation.
      shape: its sizes.
      mode: see `OpCase.make_inputs`.
      implementation: name of the implementation.
      direction: the passes that are timed.
      limit: "memory": the rate counts bytes; "matmul": FLOPs.
      seconds: time of one call.
      rate: least work per second.
      share: rate over the device's ceiling.
      kernel_seconds: with `profile`, time of the call's kernels alone; None on a CPU.
      kernel_share: share with `kernel_seconds` in place of `seconds`.
      extra_bytes: results and temporaries, at their peak, without the inputs.
      compile_seconds: time to trace and compile.
      errors: with `check`, relative L2 distance from the float64 reference, of every result
        (forward) or gradient (forward+backward) of a short sequence by name.
      reason: why there are no numbers; the fields above are None then.
    """

    op: str
    shape: str
    mode: BenchMode
    implementation: str
    direction: Direction
    limit: Literal["memory", "matmul"]
    seconds: float | None = None
    rate: float | None = None
    share: float | None = None
    kernel_seconds: float | None = None
    kernel_share: float | None = None
    extra_bytes: int | None = None
    compile_seconds: float | None = None
    errors: dict[str, float] | None = None
    reason: str | None = None


def pass_function(case: OpCase, implementation: str, direction: Direction) -> Callable[..., Any]:
    """The measured function: (differentiable, fixed, cotangents) to results.

    Returns the operation's results by name (forward), or (results, gradients).
    """

    def forward(differentiable: Any, fixed: Any, cotangents: Any) -> Any:
        del cotangents
        return case.apply(differentiable, fixed, implementation)

    def forward_and_backward(differentiable: Any, fixed: Any, cotangents: Any) -> Any:
        results, pull_back = jax.vjp(
            lambda inputs: case.apply(inputs, fixed, implementation), differentiable
        )
        return results, pull_back(cotangents)[0]

    return forward if direction == "forward" else forward_and_backward


def make_cotangents(case: OpCase, inputs: Inputs, rng: np.random.Generator) -> dict[str, Any]:
    """Random cotangents of the results of `case.apply`."""
    shapes = jax.eval_shape(lambda: case.apply(*inputs, "reference"))
    return jax.tree.map(
        lambda a: jax.random.normal(jax.random.key(int(rng.integers(2**31))), a.shape, a.dtype),
        shapes,
    )


def least_bytes(inputs: Inputs, cotangents: dict[str, Any], direction: Direction) -> int:
    """Bytes of every input read and every result written once, in each direction."""
    differentiable, fixed, results = map(_num_bytes, (*inputs, cotangents))
    forward = differentiable + fixed + results
    # Backward reads inputs and cotangents again, and writes gradients.
    return forward if direction == "forward" else 2 * forward + differentiable


def measure(
    case: OpCase,
    mode: BenchMode,
    implementation: str,
    ceilings: Ceilings,
    *,
    inputs: Inputs,
    cotangents: dict[str, Any],
    errors: dict[Direction, dict[str, float]] | None = None,
    profile: bool = False,
) -> Iterator[Measurement]:
    """Times one implementation in both directions; the row of a refusal has its reason."""
    for direction in get_args(Direction):
        row = Measurement(case.op, str(case), mode, implementation, direction, case.limit)
        start = time.perf_counter()
        try:
            function = jax.jit(pass_function(case, implementation, direction))
            compiled = function.lower(*inputs, cotangents).compile()
            compile_seconds = time.perf_counter() - start
            seconds = seconds_per_call(compiled, *inputs, cotangents)
            call = partial(compiled, *inputs, cotangents)
            kernels = kernel_times(call, calls=PROFILED_CALLS) if profile else []
        except REFUSALS as error:
            yield dataclasses.replace(row, reason=first_line(error))
            continue
        if case.limit == "memory":
            work, ceiling = least_bytes(inputs, cotangents, direction), ceilings.bytes_per_second
        else:
            flops = case.forward_flops(inputs.fixed)
            work = flops if direction == "forward" else 3 * flops
            ceiling = ceilings.flops_per_second
        memory = read_memory(compiled)
        kernel_seconds = sum(kernel.seconds for kernel in kernels) or None
        yield dataclasses.replace(
            row,
            seconds=seconds,
            rate=work / seconds,
            share=work / seconds / ceiling,
            kernel_seconds=kernel_seconds,
            kernel_share=None if kernel_seconds is None else work / kernel_seconds / ceiling,
            extra_bytes=None if memory is None else memory.outputs + memory.temporaries,
            compile_seconds=compile_seconds,
            errors=None if errors is None else errors.get(direction),
        )


class CheckedCase(NamedTuple):
    """A short case with its expected results.

    Attributes:
      case: the case.
      inputs: its inputs.
      cotangents: cotangents of its results.
      expected: (results, gradients) of the float64 reference.
    """

    case: OpCase
    inputs: Inputs
    cotangents: dict[str, Any]
    expected: Any


def make_checked(
    case: OpCase, mode: BenchMode, decay_range: DecayRange, rng: np.random.Generator
) -> CheckedCase:
    """Computes the float64 reference of the shortened case."""
    case = case.shortened()
    inputs = case.make_inputs(rng, mode, decay_range)
    cotangents = make_cotangents(case, inputs, rng)
    # TPUs have no complex128.
    on_host = jax.default_backend() == "tpu"
    device = jax.devices("cpu")[0] if on_host else None
    with jax.enable_x64(True), jax.default_device(device):
        arrays = jax.device_get((*inputs, cotangents)) if on_host else (*inputs, cotangents)
        wide = jax.tree.map(_widen, arrays)
        expected = jax.jit(pass_function(case, "reference", "forward+backward"))(*wide)
        return CheckedCase(case, inputs, cotangents, jax.tree.map(np.asarray, expected))


def measure_errors(checked: CheckedCase, implementation: str) -> dict[Direction, dict[str, float]]:
    """Errors of results and gradients by name; empty if the implementation refuses the case."""
    case, inputs, cotangents, expected = checked
    function = jax.jit(pass_function(case, implementation, "forward+backward"))
    try:
        actual = function(*inputs, cotangents)
    except REFUSALS as error:
        print(f"  not checked: {implementation} refuses {case}: {first_line(error)}")
        return {}
    return {
        direction: _named_errors(*pair)
        for direction, *pair in zip(get_args(Direction), actual, expected, strict=True)
    }


def _named_errors(actual: Any, expected: Any) -> dict[str, float]:
    def distance(found: Any, right: np.ndarray) -> float:
        found = np.asarray(found).astype(right.dtype)
        return float(np.linalg.norm(found - right) / np.linalg.norm(right))

    errors = jax.tree_util.tree_leaves_with_path(jax.tree.map(distance, actual, expected))
    return {jax.tree_util.keystr(path, simple=True, separator="."): error for path, error in errors}


def _widen(array: Any) -> Any:
    if jnp.iscomplexobj(array):
        return array.astype(jnp.complex128)
    return array.astype(jnp.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array


def _num_bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def run(options: BenchOpsOptions) -> int:
    """Measures the selected cases and prints every row at once; returns 0.

    Raises:
      ConfigError: no selected operation has a selected implementation.
    """
    if not any(case.op in options.op and _implementations(case, options) for case in CASES):
        raise ConfigError(
            f"no implementation {' or '.join(options.implementation)} of {', '.join(options.op)}"
        )
    seed = secrets.randbits(32) if options.seed is None else options.seed
    rng = np.random.default_rng(seed)
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, bfloat16, seed {seed}", flush=True)
    sizes = {"copied_bytes": 2**24, "matrix_size": 512} if options.small else {}
    ceilings = measure_ceilings(**sizes)
    print(
        f"ceilings: copy {ceilings.bytes_per_second / 1e9:,.0f} GB/s read + written, "
        f"matmul {ceilings.flops_per_second / 1e12:,.2f} TFLOP/s"
    )
    rows: list[Measurement] = []
    try:
        for row in _measure_cases(options, ceilings, rng):
            rows.append(row)
            print(format_row(row), flush=True)
    finally:
        if options.json:
            report = {
                "device": device,
                "jax": jax.__version__,
                "seed": seed,
                "decay_range": options.decay_range,
                "ceilings": ceilings._asdict(),
                "measurements": [dataclasses.asdict(row) for row in rows],
            }
            Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _measure_cases(
    options: BenchOpsOptions, ceilings: Ceilings, rng: np.random.Generator
) -> Iterator[Measurement]:
    """Measures one case after another; prints the name of each one first."""
    for case in SMALL_CASES if options.small else CASES:
        chosen = _implementations(case, options)
        modes: list[BenchMode] = [mode for mode in case.modes if mode in options.mode]
        if case.op not in options.op or not chosen or not modes:
            continue
        print(f"\n{case.op}  {case}\n{_HEADER}", flush=True)
        for mode in modes:
            inputs = case.make_inputs(rng, mode, options.decay_range)
            cotangents = make_cotangents(case, inputs, rng)
            checked = make_checked(case, mode, options.decay_range, rng) if options.check else None
            for name in chosen:
                errors = None if checked is None else measure_errors(checked, name)
                yield from measure(
                    case,
                    mode,
                    name,
                    ceilings,
                    inputs=inputs,
                    cotangents=cotangents,
                    errors=errors,
                    profile=options.profile,
                )


def _implementations(case: OpCase, options: BenchOpsOptions) -> list[str]:
    if options.implementation:
        return [name for name in case.implementations if name in options.implementation]
    # The reference takes one token at a time, or all scores at once: minutes, or all memory.
    return [name for name in case.implementations if options.small or name != "reference"]


_HEADER = (
    f"{'mode':8} {'implementation':14} {'direction':16} {'ms':>9} {'rate':>14} {'share':>7} "
    f"{'kernels ms':>10} {'share':>7} {'extra MiB':>9}  relative errors"
)


def format_row(row: Measurement) -> str:
    """One line of a case's table."""
    start = f"{row.mode:8} {row.implementation:14} {row.direction:16} "
    if row.seconds is None or row.rate is None or row.share is None:
        return f"{start}{row.reason}"
    if row.limit == "memory":
        rate = f"{row.rate / 1e9:,.1f} GB/s"
    else:
        rate = f"{row.rate / 1e12:,.3f} TFLOP/s"
    extra = "-" if row.extra_bytes is None else f"{row.extra_bytes / 2**20:,.1f}"
    errors = ", ".join(f"{name} {error:.1e}" for name, error in (row.errors or {}).items())
    kernels = "-" if row.kernel_seconds is None else f"{row.kernel_seconds * 1e3:.3f}"
    kernel_share = "-" if row.kernel_share is None else f"{row.kernel_share:.1%}"
    line = (
        f"{start}{row.seconds * 1e3:9.3f} {rate:>14} {row.share:>7.1%} "
        f"{kernels:>10} {kernel_share:>7} {extra:>9}  {errors}"
    )
    return line.rstrip()
