"""How a training step gains from more devices: every axis of the mesh, over the devices present.

    megalodon bench scaling --preset mega1.3B --rows 4 --length 4096

One device takes (rows, length); n devices take n times as much (weak scaling: n times the rows, or
n times the length where the sequence is split), or just as much (strong scaling). Efficiency is the
tokens per second over n times those of one device. The step is that of `megalodon bench train`. All
steps are compiled side by side, then measured one after another.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax

from megalodon_jax.bench.train import (
    Case,
    LoweredStep,
    StepTiming,
    lower_step,
    small,
    time_compiled,
    use_all_memory,
)
from megalodon_jax.config import MeshConfig, Remat, TrainConfig
from megalodon_jax.errors import ConfigError
from megalodon_jax.presets import preset_names

Scaling = Literal["one", "weak", "strong"]
# What is measured by default: the axes that each take all devices.
MESHES = ("data", "fsdp", "chunk", "model")
_AXIS_OF = {"data": "replica", "fsdp": "data", "chunk": "chunk", "model": "model"}


@dataclasses.dataclass(frozen=True)
class ScalingRow:
    """One measured step.

    Attributes:
      mesh: which axis takes the devices; "one" device for the row that others are compared with.
      scaling: whether the work grew with the devices.
      devices: how many.
      rows: B, of all devices.
      length: L, of all devices.
      tokens_per_second: of all devices.
      efficiency: tokens per second over those of as many single devices.
      peak_bytes: of one device.
      collective_share: collectives' time over the step's; None without a profile.
      reason: why there are no numbers.
    """

    mesh: str
    scaling: Scaling
    devices: int
    rows: int
    length: int
    tokens_per_second: float | None = None
    efficiency: float | None = None
    peak_bytes: int | None = None
    collective_share: float | None = None
    reason: str | None = None


def mesh_along(name: str, devices: int) -> MeshConfig:
    """The mesh of which one axis, by its name in `MESHES`, takes all devices."""
    return MeshConfig(**{_AXIS_OF[name]: devices})


def cases(options: argparse.Namespace, devices: int) -> Iterator[tuple[ScalingRow, TrainConfig]]:
    """What is measured, without numbers, and the run it belongs to; one device comes first."""
    base = Case(options.preset, options.rows, options.length, options.remat).config()
    if options.small:
        base = small(base)
    if options.layers:
        base = dataclasses.replace(
            base, model=dataclasses.replace(base.model, num_layers=options.layers)
        )
    rows, length = base.data.batch_size, base.data.seq_len
    yield ScalingRow("one", "one", 1, rows, length), base
    for mesh in options.mesh:
        for scaling in options.scaling:
            more = devices if scaling == "weak" else 1
            size = (rows, length * more) if mesh == "chunk" else (rows * more, length)
            data = dataclasses.replace(base.data, batch_size=size[0], seq_len=size[1])
            yield (
                ScalingRow(mesh, scaling, devices, *size),
                dataclasses.replace(base, data=data, mesh=mesh_along(mesh, devices)),
            )


class Begun(NamedTuple):
    """A step that is being compiled; the result is the step and the seconds it took."""

    step: LoweredStep
    compiled: Future[tuple[jax.stages.Compiled, float]]


def begin(config: TrainConfig, pool: Executor, *, documents: int = 0) -> Begun | str:
    """Traces a run's step, which takes Python, and has it compiled in the pool, which does not.

    Returns the reason instead where the run does not fit its mesh.
    """
    try:
        step = lower_step(config, documents=documents)
    except ConfigError as error:
        return str(error)
    return Begun(step, pool.submit(step.compile))


def count_devices(benchmark: str) -> int:
    """All devices; raises `ConfigError` if there is one only."""
    devices = len(jax.devices())
    if devices < 2:
        raise ConfigError(f"{benchmark} compares several devices with one, and there is one")
    return devices


def compiler_pool() -> ThreadPoolExecutor:
    """Threads for so many compilers as this machine has room for."""
    return ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2))


def measure(row: ScalingRow, begun: Begun | str, alone: float | None, steps: int) -> ScalingRow:
    """The row with numbers, or with the reason why the mesh or the memory does not allow them.

    Args:
      row: what to measure.
      begun: its step, or the reason why it has none.
      alone: tokens per second of one device, None if that is what this row measures.
      steps: how many are timed.
    """
    if isinstance(begun, str):
        return dataclasses.replace(row, reason=begun)
    try:
        timing = time_compiled(begun.step, *begun.compiled.result(), steps=steps, profile=True)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return dataclasses.replace(row, reason=str(error).splitlines()[0])
    rate = timing.tokens_per_second
    return dataclasses.replace(
        row,
        tokens_per_second=rate,
        efficiency=rate / (row.devices * (rate if alone is None else alone)),
        peak_bytes=timing.peak_bytes,
        collective_share=_collective_share(timing, row.rows * row.length),
    )


def _collective_share(timing: StepTiming, tokens: int) -> float | None:
    if not timing.kernels:
        return None
    seconds = sum(kernel.seconds for kernel in timing.kernels if kernel.kind == "collectives")
    return seconds * timing.tokens_per_second / tokens


def run(options: argparse.Namespace) -> list[ScalingRow]:
    """Measures what the options choose, printing every row as it comes.

    Raises:
      ConfigError: there is one device only.
    """
    devices = count_devices("bench scaling")
    kind = jax.devices()[0].device_kind
    todo = list(cases(options, devices))
    print(f"{devices} x {kind}, jax {jax.__version__}; compiling {len(todo)} steps", flush=True)
    # Measured only then, for compilers also try out matrix products on the devices.
    with compiler_pool() as pool:
        begun = [begin(config, pool) for _, config in todo]
    print(_HEADER, flush=True)
    measured: list[ScalingRow] = []
    alone = None
    for (row, _), step in zip(todo, begun, strict=True):
        done = measure(row, step, alone, options.steps)
        alone = done.tokens_per_second if alone is None else alone
        measured.append(done)
        print(_format(done), flush=True)
        if options.json:
            report = {"device": kind, "rows": [dataclasses.asdict(each) for each in measured]}
            Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
        if alone is None:
            raise ConfigError(f"one device cannot take this, so nothing compares: {done.reason}")
    return measured


_HEADER = (
    f"{'mesh':6} {'scaling':7} {'rows':>5} {'length':>8} {'tokens/s':>10} {'efficiency':>10} "
    f"{'peak GB':>8} {'collectives':>11}"
)


def _format(row: ScalingRow) -> str:
    start = f"{row.mesh:6} {row.scaling:7} {row.rows:5} {row.length:8} "
    if row.tokens_per_second is None or row.efficiency is None or row.peak_bytes is None:
        return f"{start}{row.reason}"
    share = "-" if row.collective_share is None else f"{row.collective_share:.1%}"
    return (
        f"{start}{row.tokens_per_second:10,.0f} {row.efficiency:10.1%} "
        f"{row.peak_bytes / 1e9:8.1f} {share:>11}"
    )


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="megalodon bench scaling", description="Measures what more devices gain."
    )
    parser.add_argument("--preset", choices=preset_names(), default="mega1.3B")
    parser.add_argument("--rows", type=int, default=4, help="of one device")
    parser.add_argument("--length", type=int, default=4096, help="of one device")
    parser.add_argument(
        "--layers", type=int, default=0, help="fewer than the preset's compile sooner; 0: all"
    )
    parser.add_argument("--remat", choices=get_args(Remat), default="none")
    parser.add_argument("--mesh", nargs="+", choices=MESHES, default=MESHES)
    parser.add_argument(
        "--scaling", nargs="+", choices=("weak", "strong"), default=("weak", "strong")
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--small", action="store_true", help="a shape for a CPU")
    parser.add_argument("--json", metavar="FILE", help="write the measurements there too")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; argv without the program's name, None: that of the process."""
    options: Any = make_parser().parse_args(argv)
    use_all_memory()
    run(options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
