"""Weak and strong scaling of a training step along every axis of the mesh.

    megalodon bench scaling --preset mega1.3B --rows 4 --length 4096

One device takes (rows, length). n devices take n times as much (weak scaling: n times the rows, or
n times the length where the sequence is sharded), or the same (strong scaling). Efficiency is the
tokens per second over n times those of a single device. GPUs of one kind differ by 1 % and more, so
each of them is measured alone, and their mean counts. The step is that of `megalodon bench train`.
All steps are compiled in parallel, then measured one after another.
"""

import dataclasses
import json
import os
import statistics
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Mesh

from megalodon_jax.bench.options import BenchScalingOptions, MeshName, ScalingKind
from megalodon_jax.bench.train import (
    LoweredStep,
    StepTiming,
    TrainCase,
    lower_step,
    small,
    time_compiled,
    use_all_memory,
)
from megalodon_jax.config import MeshConfig, TrainConfig
from megalodon_jax.errors import ConfigError
from megalodon_jax.parallel.mesh import make_mesh

_AXIS_OF = {"data": "replica", "fsdp": "data", "chunk": "chunk", "model": "model"}


@dataclasses.dataclass(frozen=True)
class ScalingRow:
    """One measured step.

    Attributes:
      mesh: the mesh that takes all devices; "one" for the single device of the comparison.
      scaling: whether the work grows with the devices; "one" for the single device.
      devices: number of devices.
      rows: rows B, over all devices.
      length: tokens L of a whole row.
      tokens_per_second: of all devices together.
      efficiency: tokens per second over those of as many single devices.
      peak_bytes: memory of one device.
      collective_share: collectives' time over the step's; None without a profile.
      reason: why there are no numbers.
    """

    mesh: MeshName | Literal["one"]
    scaling: ScalingKind | Literal["one"]
    devices: int
    rows: int
    length: int
    tokens_per_second: float | None = None
    efficiency: float | None = None
    peak_bytes: int | None = None
    collective_share: float | None = None
    reason: str | None = None


def mesh_along(name: MeshName, devices: int) -> MeshConfig:
    """The mesh of which one axis takes all devices, or all but pairs along a second axis.

    Raises:
      ConfigError: an odd number of devices has no pairs.
    """
    first, *second = (_AXIS_OF[axis] for axis in name.split("+"))
    if second and devices % 2:
        raise ConfigError(f"mesh {name} needs an even number of devices, there are {devices}")
    return MeshConfig(**{first: devices // (2 if second else 1), **dict.fromkeys(second, 2)})


def scaling_cases(
    options: BenchScalingOptions, devices: int
) -> Iterator[tuple[ScalingRow, TrainConfig]]:
    """The table's rows without numbers, and their runs; the single device comes first."""
    base = TrainCase(
        options.preset,
        options.rows,
        options.length,
        options.remat,
        reduce_dtype=options.reduce_dtype,
    ).config()
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
            config = mesh_along(mesh, devices)
            size = rows, length
            if scaling == "weak":
                size = rows * devices // config.chunk, length * config.chunk
            data = dataclasses.replace(base.data, batch_size=size[0], seq_len=size[1])
            yield (
                ScalingRow(mesh, scaling, devices, *size),
                dataclasses.replace(base, data=data, mesh=config),
            )


class PendingCompile(NamedTuple):
    """A step that is being compiled.

    Attributes:
      step: the traced step.
      compiled: the result of `LoweredStep.compile`.
    """

    step: LoweredStep
    compiled: Future[tuple[jax.stages.Compiled, float]]


def start_compile(
    config: TrainConfig, pool: Executor, *, documents: int = 0, mesh: Mesh | None = None
) -> PendingCompile | str:
    """Traces a run's step here, and compiles it in the pool: tracing holds Python's lock.

    Args:
      config: the run.
      pool: threads that compile.
      documents: documents packed into a row; 0: no segment ids.
      mesh: devices; None: those of `config.mesh`.

    Returns:
      The step, or the reason why the run does not fit its mesh.
    """
    try:
        step = lower_step(config, documents=documents, mesh=mesh)
    except ConfigError as error:
        return str(error)
    return PendingCompile(step, pool.submit(step.compile))


def count_devices(benchmark: str) -> int:
    """The number of devices; raises `ConfigError` if there is only one."""
    devices = len(jax.devices())
    if devices < 2:
        raise ConfigError(f"{benchmark} compares several devices with one; this host has only one")
    return devices


def _devices_to_compare() -> list[Any]:
    """Devices that are measured alone: every GPU, because clocks differ, or one TPU or CPU."""
    devices = jax.devices()
    return devices if devices[0].platform == "gpu" else devices[:1]


def compiler_pool() -> ThreadPoolExecutor:
    """Threads that compile, one for every two CPU cores."""
    return ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2))


def measure(
    row: ScalingRow, pending: PendingCompile | str, single_device: float | None, steps: int
) -> ScalingRow:
    """The row with numbers, or with the reason why it has none: the mesh, or the memory.

    Args:
      row: the row.
      pending: its step, or the reason why it has none.
      single_device: tokens per second of one device; None if this row measures it.
      steps: steps that are timed.
    """
    if isinstance(pending, str):
        return dataclasses.replace(row, reason=pending)
    try:
        timing = time_compiled(pending.step, *pending.compiled.result(), steps=steps, profile=True)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return dataclasses.replace(row, reason=str(error).splitlines()[0])
    rate = timing.tokens_per_second
    return dataclasses.replace(
        row,
        tokens_per_second=rate,
        efficiency=rate / (row.devices * (rate if single_device is None else single_device)),
        peak_bytes=timing.peak_bytes,
        collective_share=_collective_share(timing, row.rows * row.length),
    )


def _collective_share(timing: StepTiming, tokens: int) -> float | None:
    if not timing.kernels:
        return None
    seconds = sum(kernel.seconds for kernel in timing.kernels if kernel.kind == "collectives")
    return seconds * timing.tokens_per_second / tokens


def run(options: BenchScalingOptions) -> int:
    """Measures the selected meshes and prints every row at once; returns 0.

    Raises:
      ConfigError: there is only one device, or the run does not fit on a single device.
    """
    use_all_memory()
    devices = count_devices("bench scaling")
    kind = jax.devices()[0].device_kind
    cases = list(scaling_cases(options, devices))
    print(f"{devices} x {kind}, jax {jax.__version__}; compiling {len(cases)} steps", flush=True)
    # Nothing is measured before the last compilation: XLA times matrix products on the devices.
    (one, base), *others = cases
    with compiler_pool() as pool:
        alone = [
            start_compile(base, pool, mesh=make_mesh(base.mesh, [device]))
            for device in _devices_to_compare()
        ]
        pending = [start_compile(config, pool) for _, config in others]
    print(_HEADER, flush=True)
    measured: list[ScalingRow] = []
    single_device = None
    steps = [(one, step) for step in alone]
    steps += [(row, step) for (row, _), step in zip(others, pending, strict=True)]
    for number, (row, step) in enumerate(steps, start=1):
        done = measure(row, step, single_device, options.steps)
        if number == len(alone):
            rates = [each.tokens_per_second for each in (*measured, done)]
            single_device = statistics.mean(rate for rate in rates if rate)
        measured.append(done)
        print(_format(done), flush=True)
        if options.json:
            report = {"device": kind, "rows": [dataclasses.asdict(each) for each in measured]}
            Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
        if done.tokens_per_second is None and number <= len(alone):
            raise ConfigError(
                f"the run does not fit on a single device, the base of all rows: {done.reason}"
            )
    return 0


_HEADER = (
    f"{'mesh':10} {'scaling':7} {'rows':>5} {'length':>8} {'tokens/s':>10} {'efficiency':>10} "
    f"{'peak GB':>8} {'collectives':>11}"
)


def _format(row: ScalingRow) -> str:
    start = f"{row.mesh:10} {row.scaling:7} {row.rows:5} {row.length:8} "
    if row.tokens_per_second is None or row.efficiency is None or row.peak_bytes is None:
        return f"{start}{row.reason}"
    share = "-" if row.collective_share is None else f"{row.collective_share:.1%}"
    return (
        f"{start}{row.tokens_per_second:10,.0f} {row.efficiency:10.1%} "
        f"{row.peak_bytes / 1e9:8.1f} {share:>11}"
    )
