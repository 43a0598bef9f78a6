"""The TPU compiler's estimates of kernels: their cycles beside those of plain JAX.

    megalodon bench tpu_estimates --chips v5e          # or v4, v5p, v6e; no TPU is needed
    megalodon bench tpu_estimates --chips v5e --op timestep_norm      # or chunk_decode

Nothing runs. For kernels, this counts the instruction bundles (one a cycle) of the compiler's final
schedule, times the trips of every loop, with every branch taken; waiting for memory is not
included. For plain JAX, it sums the compiler's own "estimated_cycles" of all operations.
"""

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from megalodon_jax.bench.options import BenchTpuEstimatesOptions, EstimatedChip
from megalodon_jax.bench.tpu_decode_estimates import decode_table
from megalodon_jax.chips import require_chip
from megalodon_jax.compiled.hlo import parse_program
from megalodon_jax.compiled.kernels import count_estimated_cycles
from pallas_kernels.cema import CemaParams, cema
from pallas_kernels.cema.pallas_tpu.block_sizes import tile_for
from pallas_kernels.cema.pallas_tpu.layout import CHANNELS
from pallas_kernels.timestep_norm import timestep_norm
from pallas_kernels.timestep_norm.pallas_tpu.block_sizes import choose_blocks

# On v4 a device is one core: the kernels are compiled for a core.
TOPOLOGIES: dict[EstimatedChip, str] = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:1x1",
    "v5p": "v5p:1x1x1",
    "v6e": "v6e:1x1",
}
# Loops of the forward and of the backward kernel: (first loops, which build the tables; last loops,
# which sum the tables' gradients).
TABLE_LOOPS = ((1, 0), (1, 1))
ORDER = 16
# Bundles after a branch that still execute.
_BRANCH_DELAY = 4
_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s*(?:([A-Z]{2})\s*)?:")
_EXIT_TEST = re.compile(
    r"%(p\d+)(?:_p\d+)? = scmp\.ge\.s32\.totalorder %(s\d+)_s\d+, (\d+) /\* loop exit test"
)


class Loop(NamedTuple):
    """A loop of a kernel's schedule.

    Attributes:
      bundles: bundles of its body.
      trips: iterations; None if they are not a constant.
    """

    bundles: int
    trips: int | None


class Schedule(NamedTuple):
    """One grid step of a kernel.

    Attributes:
      straight: bundles outside loops.
      loops: the loops inside the grid's loop.
    """

    straight: int
    loops: tuple[Loop, ...]

    def cycles(self, *, first: int, last: int) -> tuple[int, int]:
        """(cycles of every grid step, cycles once for 128 channels).

        Args:
          first: number of first loops that run once for 128 channels.
          last: number of last loops that do.
        """
        loops = [loop.bundles * (loop.trips or 1) for loop in self.loops]
        once = sum(loops[:first]) + sum(loops[len(loops) - last :])
        return self.straight + sum(loops) - once, once


def read_schedule(text: str) -> Schedule:
    """Parses one of libtpu's dumps "...-final_bundles.txt"."""
    bundles: list[tuple[str | None, str]] = []
    for line in text.splitlines():
        match = _BUNDLE.match(line)
        if match:
            bundles.append((match[1], line))
        elif bundles:
            bundles[-1] = (bundles[-1][0], f"{bundles[-1][1]}\n{line}")
    heads = [i for i, (label, _) in enumerate(bundles) if label == "LB"]
    if not heads:
        raise ValueError("the schedule has no loop; compile a grid of several steps")
    grid, *inner = heads
    loops = tuple(_read_loop(bundles, head) for head in inner)
    last = max(i for i, (_, body) in enumerate(bundles) if "loop exit test" in body)
    return Schedule(last - grid - sum(loop.bundles for loop in loops), loops)


def _read_loop(bundles: list[tuple[str | None, str]], head: int) -> Loop:
    body = ""
    tests: list[tuple[str, ...]] = []
    for i in range(head, len(bundles)):
        body += bundles[i][1]
        tests += _EXIT_TEST.findall(bundles[i][1])
        for predicate, counter, bound in tests:
            if re.search(rf"sbr\.rel \(!%{predicate}(_p\d+)?\) target", bundles[i][1]):
                step = re.search(rf"%{counter}(?:_s\d+)? = sadd\.s32 (\d+), ", body)
                trips = int(bound) // int(step[1]) if step else None
                return Loop(i - head + 1 + _BRANCH_DELAY, trips)
    raise ValueError(f"the loop that starts at bundle {head} has no end")


class EstimatedOperation(NamedTuple):
    """An operation at one shape, with bfloat16 x.

    Attributes:
      call: (implementation, x, parameters) to y.
      shape: shape of x.
      parameters: shapes of the parameters, float32.
      kernels: names of the forward and the backward kernel.
      cycles: (device kind, schedules of both kernels) to each kernel's cycles per token.
      floor_bytes: bytes per token and channel that must move, forward and backward.
    """

    call: Callable[[Any, Any, Any], Any]
    shape: tuple[int, int, int]
    parameters: Any
    kernels: tuple[str, str]
    cycles: Callable[[str, list[Schedule]], list[float]]
    floor_bytes: tuple[int, int]


def cema_operation(rows: int, length: int, channels: int) -> EstimatedOperation:
    """CEMA of order `ORDER`."""

    def cycles(kind: str, schedules: list[Schedule]) -> list[float]:
        each = []
        for schedule, tokens, loops in zip(
            schedules, tile_for(kind).tokens, TABLE_LOOPS, strict=True
        ):
            step, once = schedule.cycles(first=loops[0], last=loops[1])
            print(f"{kind}: {step} cycles for {tokens} tokens of 128 channels, once {once}")
            tiles = -(-length // tokens)
            each.append((step * tiles + once / rows) / length * channels / CHANNELS)
        return each

    matrix, vector = (channels, ORDER), (channels,)
    parameters: Any = CemaParams(*cast(Any, (matrix, matrix, vector, (*matrix, 2), vector)))
    return EstimatedOperation(
        lambda name, x, params: cema(x, params, implementation=name).y,
        (rows, length, channels),
        parameters,
        ("cema_forward", "cema_backward"),
        cycles,
        # x, y; x, dy, dx; and one byte of saved states in each.
        (5, 7),
    )


def timestep_norm_operation(
    rows: int, length: int, channels: int, groups: int
) -> EstimatedOperation:
    """TimestepNorm with `groups` groups."""
    blocks = choose_blocks(length, groups, channels // groups, 2)
    if blocks is None:
        raise ValueError(f"no block of {groups} groups of {channels} channels fits into VMEM")

    def cycles(kind: str, schedules: list[Schedule]) -> list[float]:
        steps = [sum(schedule.cycles(first=0, last=0)) for schedule in schedules]
        print(f"{kind}: {steps} cycles for {blocks.tokens} tokens of {blocks.channels} channels")
        tiles = -(-length // blocks.tokens)
        return [step * tiles / length * channels / blocks.channels for step in steps]

    return EstimatedOperation(
        lambda name, x, vectors: (
            timestep_norm(x, *vectors, num_groups=groups, implementation=name).y
        ),
        (rows, length, channels),
        ((channels,), (channels,)),
        ("timestep_norm_forward", "timestep_norm_backward"),
        cycles,
        (4, 6),
    )


class Estimate(NamedTuple):
    """Nanoseconds per token of one pass over x.

    Attributes:
      kernel: the Pallas kernels.
      around: XLA's operations around them.
      xla: the same in plain JAX.
      floor: the least memory traffic at the peak rate.
    """

    kernel: float
    around: float
    xla: float
    floor: float


def estimate(
    chip: EstimatedChip, operation: EstimatedOperation, dumps: Path
) -> dict[str, Estimate]:
    """Estimates for the forward pass, and for the forward and the backward pass.

    Args:
      chip: the kind of TPU.
      operation: the operation to compile.
      dumps: the empty directory that LIBTPU_INIT_ARGS names for dumps.
    """
    device = _device_of(chip)
    pallas, xla = (
        [
            count_estimated_cycles(parse_program(text))
            for text in _compile_passes(operation, name, device)
        ]
        for name in ("pallas_tpu", "xla")
    )
    schedules = []
    for name in operation.kernels:
        # The forward kernel is compiled twice: with and without saved states.
        paths = sorted(dumps.glob(f"*{name}*-final_bundles.txt"))
        path = next(path for path in paths if "schedule-analysis" not in path.name)
        schedules.append(read_schedule(path.read_text()))
    cycles = operation.cycles(device.device_kind, schedules)
    kernels = [cycles[0], cycles[0] + cycles[1]]
    sheet = require_chip(device.device_kind)
    assert sheet.clock_hz is not None
    clock, bandwidth = sheet.clock_hz / 1e9, sheet.memory_bytes_per_second / 1e9
    tokens = operation.shape[0] * operation.shape[1]
    floors = [
        sum(operation.floor_bytes[:n]) * operation.shape[2] / bandwidth for n in (1, 2)
    ]  # fmt: skip
    return {
        kind: Estimate(
            kernels[i] / clock,
            pallas[i] / tokens / clock,
            xla[i] / tokens / clock,
            floors[i],
        )
        for i, kind in enumerate(("forward", "forward + backward"))
    }


def _compile_passes(
    operation: EstimatedOperation, implementation: Literal["pallas_tpu", "xla"], device: Any
) -> tuple[str, str]:
    """Optimized HLO of the forward pass, and of the forward and backward pass."""
    sharding = NamedSharding(Mesh(np.array([device]), ("device",)), PartitionSpec())

    def shaped(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def forward(x: Any, params: Any) -> Any:
        return operation.call(implementation, x, params)

    def both(x: Any, params: Any, cotangent: Any) -> Any:
        y, pull_back = jax.vjp(forward, x, params)
        return y, pull_back(cotangent)

    def is_shape(node: Any) -> bool:
        return isinstance(node, tuple) and all(isinstance(size, int) for size in node)

    params = jax.tree.map(shaped, operation.parameters, is_leaf=is_shape)
    x = shaped(operation.shape, jnp.bfloat16)
    # Without the mesh, Pallas takes the target from the process's own backend.
    with jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh):
        lowered = (jax.jit(forward).lower(x, params), jax.jit(both).lower(x, params, x))
    first, second = (each.compile().as_text() or "" for each in lowered)
    return first, second


def run(options: BenchTpuEstimatesOptions) -> int:
    """Prints a table for every chip; returns 0."""
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    with tempfile.TemporaryDirectory() as directory:
        # libtpu reads it once, at the first topology.
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true "
            "--xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"
        )
        tables = _decode_tables if options.op == "chunk_decode" else _sequence_tables
        for line in tables(options, Path(directory)):
            print(line, flush=True)
    return 0


def _decode_tables(options: BenchTpuEstimatesOptions, dumps: Path) -> Iterator[str]:
    yield "chunk_decode, bfloat16, us of a layer in a step"
    for chip in options.chips:
        device = _device_of(chip)
        sheet = require_chip(device.device_kind)
        yield from decode_table(
            chip,
            device,
            sheet,
            dumps,
            lambda text: sum(read_schedule(text).cycles(first=0, last=0)),
        )


def _sequence_tables(options: BenchTpuEstimatesOptions, dumps: Path) -> Iterator[str]:
    shape = (options.rows, options.length, options.channels)
    if options.op == "cema":
        operation = cema_operation(*shape)
    else:
        operation = timestep_norm_operation(*shape, options.groups)
    yield f"{options.op} {shape} bfloat16, ns a token"
    for chip in options.chips:
        estimates = estimate(chip, operation, dumps)
        yield f"| {chip} | memory floor | kernels | around them | plain JAX |"
        for kind, each in estimates.items():
            yield (
                f"| {kind} | {each.floor:.3g} | {each.kernel:.3g} | {each.around:.3g} "
                f"| {each.xla:.3g} |"
            )
        for path in dumps.iterdir():
            path.unlink()


def _device_of(chip: EstimatedChip) -> Any:
    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]
