r"""The kernels of a decoding step, timed alone: chunk decoding and the products of a layer.

    megalodon bench decode_kernels                              # mega200M, 1, 8 and 64 rows
    megalodon bench decode_kernels --rows 64 --weights model int8 --kv model int8 --check
    megalodon bench decode_kernels --rows 64 --op chunk_decode --kv model int8 --tilings

A program calls an operation for several caches or matrices in turn. The time of a call is that of
all kernels in a profile of the program over its calls; without a GPU it is the program's time by
the host's clock. The share compares it with the least bytes, every operand read and every result
written once, at the rate of a large copy on the same device in the same run.
"""

import dataclasses
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax

from megalodon_jax.bench.ceilings import measure_ceilings
from megalodon_jax.bench.chunk_decode_case import ChunkDecodeCase
from megalodon_jax.bench.decode import bench_config
from megalodon_jax.bench.decode_kernel_case import KernelCase, KernelErrors, Variant
from megalodon_jax.bench.kernel_times import KernelTimes, kernel_times
from megalodon_jax.bench.options import BenchDecodeKernelsOptions, DecodeKernel
from megalodon_jax.bench.refusals import REFUSALS, first_line
from megalodon_jax.bench.skinny_matmul_cases import product_cases
from megalodon_jax.bench.timing import seconds_per_call
from megalodon_jax.bench.train import use_all_memory
from megalodon_jax.config import ModelConfig
from megalodon_jax.errors import ConfigError
from pallas_kernels.common.target import find_target

# Arrays in turn have at least these bytes together, twice the L2 cache of an H200.
FEWEST_BYTES = 100 * 2**20
PROFILED_CALLS = 10
# The kind of an operation's own kernels in `kernel_times`.
_OWN_KINDS: dict[DecodeKernel, str] = {
    "chunk_decode": "chunk decoding",
    "skinny_matmul": "matrix products",
}


@dataclasses.dataclass(frozen=True)
class KernelMeasurement:
    """One row of the table.

    Attributes:
      op: name of the operation.
      call: the call in a step, with its sizes.
      rows: rows that decode together.
      format: of the matrix, or of keys and values.
      implementation: name of the implementation.
      tiling: of `mosaic_gpu`, by the names of its fields; None: the chosen one.
      arrays: caches or matrices in turn.
      least_bytes: every operand read and every result written once.
      seconds: time of one call, by `clock`.
      clock: "kernels": all kernels of a profile; "host": the host's clock, without a GPU.
      own_seconds: time of the kernels that multiply or decode, without those around them; None by
        the host's clock, and where the profile has no kernel of such a name.
      launches: kernels of a call; None by the host's clock.
      share: the time of the least bytes at the copy rate, over `seconds`.
      errors: with `check`, of one call.
      reason: why there are no numbers; the fields above are None then.
    """

    op: DecodeKernel
    call: str
    rows: int
    format: str
    implementation: str
    tiling: dict[str, Any] | None
    arrays: int
    least_bytes: int
    seconds: float | None = None
    clock: Literal["kernels", "host"] | None = None
    own_seconds: float | None = None
    launches: float | None = None
    share: float | None = None
    errors: KernelErrors | None = None
    reason: str | None = None


def run(options: BenchDecodeKernelsOptions) -> int:
    """Measures the selected calls and prints every row at once; returns 0.

    Raises:
      ConfigError: a number below 1, or a preset without chunk decoding.
    """
    config = _check(options)
    use_all_memory()
    device = jax.devices()[0].device_kind
    sizes: dict[str, int] = {"copied_bytes": 2**24, "matrix_size": 256} if options.small else {}
    rate = measure_ceilings(**sizes).bytes_per_second
    print(f"{device}, jax {jax.__version__}, bfloat16, copy {rate / 1e9:,.0f} GB/s", flush=True)
    measured: list[KernelMeasurement] = []
    try:
        print(_HEADER, flush=True)
        for case in selected_cases(options, config):
            for row in measure(case, variants_of(case, options.tilings), rate, options.check):
                measured.append(row)
                print(format_row(row), flush=True)
    finally:
        if options.json:
            rows = [
                dataclasses.asdict(row) | {"errors": row.errors and row.errors._asdict()}
                for row in measured
            ]
            report = {
                "device": device,
                "jax": jax.__version__,
                "preset": options.preset,
                "bytes_per_second": rate,
                "measurements": rows,
            }
            Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0


def selected_cases(options: BenchDecodeKernelsOptions, config: ModelConfig) -> Iterator[KernelCase]:
    """The calls of every number of rows and format, with as many arrays as L2 does not hold."""
    for rows in options.rows:
        if "chunk_decode" in options.op:
            for kv in options.kv:
                case = ChunkDecodeCase(config, rows, kv, options.position, options.layers)
                yield _with_enough_arrays(case, options)
        if "skinny_matmul" in options.op:
            for weights in options.weights:
                for case in product_cases(config, rows, weights, options.layers):
                    yield _with_enough_arrays(case, options)


def variants_of(case: KernelCase, has_tilings: bool) -> list[Variant]:
    """XLA; on Hopper also the kernel, with the chosen tiling and those around it."""
    if not find_target().is_hopper:
        return [Variant("xla")]
    tilings = case.tilings() if has_tilings else []
    return [
        Variant("mosaic_gpu"),
        *(Variant("mosaic_gpu", tiling) for tiling in tilings),
        Variant("xla"),
    ]


def measure(
    case: KernelCase, variants: list[Variant], bytes_per_second: float, check: bool
) -> Iterator[KernelMeasurement]:
    """Measures implementations of a call; the row of a refusal has its reason.

    Args:
      case: the call.
      variants: implementations with their tilings; compiled side by side before the first runs.
      bytes_per_second: the rate of a copy.
      check: compare one call with float32.
    """
    operands = case.make_operands()

    def build(variant: Variant) -> jax.stages.Compiled | str:
        try:
            program = jax.jit(case.program(variant), donate_argnums=1)
            return program.lower(*operands).compile(compiler_options=_compiler_options())
        except REFUSALS as error:
            return first_line(error)

    with ThreadPoolExecutor() as pool:
        programs = list(pool.map(build, variants))
    donated = operands.donated
    for variant, program in zip(variants, programs, strict=True):
        tiling = variant.tiling
        row = KernelMeasurement(
            case.op,
            case.call,
            case.rows,
            case.format,
            variant.implementation,
            None if tiling is None else tiling._asdict(),
            case.arrays,
            case.least_bytes,
        )
        if isinstance(program, str):
            yield dataclasses.replace(row, reason=program)
            continue

        def call(program: jax.stages.Compiled = program) -> Any:
            nonlocal donated
            results, donated = program(operands.fixed, donated)
            return results

        try:
            timed = _with_times(row, case.calls, call, bytes_per_second)
            errors = case.measure_error(variant) if check else None
        except REFUSALS as error:
            yield dataclasses.replace(row, reason=first_line(error))
            # A call that fails takes the donated arrays with it.
            donated = case.make_operands().donated
            continue
        yield dataclasses.replace(timed, errors=errors)


def _compiler_options() -> dict[str, Any]:
    """Products read different matrices: kernels of a CUDA graph might run side by side."""
    return {"xla_gpu_graph_min_graph_size": 10**6} if find_target().platform == "gpu" else {}


def _with_times(
    row: KernelMeasurement, calls: int, program: Any, bytes_per_second: float
) -> KernelMeasurement:
    has_gpu = find_target().platform == "gpu"
    kinds = kernel_times(program, calls=PROFILED_CALLS) if has_gpu else []
    own, launches = None, None
    if kinds:
        seconds = sum(kind.seconds for kind in kinds) / calls
        own, launches = _own_seconds(row.op, kinds, calls), sum(k.launches for k in kinds) / calls
    else:
        seconds = seconds_per_call(program, repeats=3, seconds=0.05) / calls
    return dataclasses.replace(
        row,
        seconds=seconds,
        clock="kernels" if kinds else "host",
        own_seconds=own,
        launches=launches,
        share=row.least_bytes / bytes_per_second / seconds,
    )


def _own_seconds(op: DecodeKernel, kinds: list[KernelTimes], calls: int) -> float | None:
    own = [kind.seconds for kind in kinds if kind.kind == _OWN_KINDS[op]]
    return own[0] / calls if own else None


def _with_enough_arrays(case: Any, options: BenchDecodeKernelsOptions) -> KernelCase:
    # A CPU's small model is measured to see that the command works.
    fewest = 0 if options.small else FEWEST_BYTES
    arrays = max(options.layers, -(-fewest // case.array_bytes))
    return dataclasses.replace(case, arrays=arrays)


def _check(options: BenchDecodeKernelsOptions) -> ModelConfig:
    numbers = {"rows": (1, options.rows), "layers": (1, (options.layers,))}
    numbers["position"] = (0, (options.position,))
    for name, (least, values) in numbers.items():
        if wrong := [value for value in values if value < least]:
            raise ConfigError(f"--{name} has {wrong[0]}; use numbers of at least {least}")
    config = bench_config(options.preset, "bfloat16", is_small=options.small)
    if not isinstance(config, ModelConfig):
        raise ConfigError(
            f"{options.preset!r} is a Transformer, which has other kernels; use the MEGALODON of "
            "its size"
        )
    return config


_HEADER = (
    f"\n{'call':38} {'format':6} {'rows':>4} {'implementation':28} {'arrays':>6} {'MB':>8} "
    f"{'us':>9} {'alone':>8} {'kernels':>7} {'share':>6}  error"
)


def format_row(row: KernelMeasurement) -> str:
    """One line of the table: "alone" is the time of the operation's own kernels."""
    tiling = "" if row.tiling is None else _format_tiling(row.tiling)
    start = (
        f"{row.call:38} {row.format:6} {row.rows:4} {row.implementation + tiling:28} "
        f"{row.arrays:6} {row.least_bytes / 1e6:8.2f} "
    )
    if row.seconds is None or row.share is None:
        return f"{start}{row.reason}"
    own = "-" if row.own_seconds is None else f"{row.own_seconds * 1e6:.2f}"
    launches = "-" if row.launches is None else f"{row.launches:.1f}"
    line = f"{start}{row.seconds * 1e6:9.2f} {own:>8} {launches:>7} {row.share:6.1%}"
    if row.errors is None:
        return line
    differing = row.errors.differing
    cached = f", {differing} cached numbers differ" if differing else ""
    return f"{line}  {row.errors.relative:.1e}{cached}"


def _format_tiling(tiling: dict[str, Any]) -> str:
    """Sizes and the names of what is loaded ahead."""
    values = [name if value is True else str(value) for name, value in tiling.items() if value]
    return f" ({', '.join(values)})"
