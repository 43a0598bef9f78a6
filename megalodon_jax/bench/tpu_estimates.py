"""What the TPU compiler expects of kernels: their cycles beside those of plain JAX.

    python -m megalodon_jax.bench.tpu_estimates v5e          # or v4, v5p, v6e; no TPU is needed
    python -m megalodon_jax.bench.tpu_estimates v5e --op timestep_norm

Nothing runs. For the kernels this counts instruction bundles (one a cycle) in the compiler's final
schedule, times the trips of every loop, branches as if always taken; it knows nothing of waiting
for memory. For plain JAX it adds up the compiler's own "estimated_cycles" of all operations.
"""

import argparse
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.cema import CemaParams, cema
from pallas_kernels.cema.pallas_tpu.block_sizes import tile_for
from pallas_kernels.cema.pallas_tpu.layout import CHANNELS
from pallas_kernels.timestep_norm import timestep_norm
from pallas_kernels.timestep_norm.pallas_tpu.block_sizes import choose_blocks

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1"}
# GHz of a core and GB/s of its memory, from Google Cloud's pages on each generation.
CLOCKS = {"v4": 1.05, "v5e": 1.5, "v5p": 1.75, "v6e": 1.75}
BANDWIDTHS = {"v4": 1200, "v5e": 819, "v5p": 2765, "v6e": 1640}
# Loops that make tables before all others, and that add up their gradients after them.
TABLE_LOOPS = ((1, 0), (1, 1))
ORDER = 16
# A branch takes effect after so many more bundles.
_BRANCH_DELAY = 4
_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s*(?:([A-Z]{2})\s*)?:")
_EXIT_TEST = re.compile(
    r"%(p\d+)(?:_p\d+)? = scmp\.ge\.s32\.totalorder %(s\d+)_s\d+, (\d+) /\* loop exit test"
)


class Loop(NamedTuple):
    """A loop of a kernel's schedule.

    Attributes:
      bundles: in its body.
      trips: iterations, or None if they are not a constant.
    """

    bundles: int
    trips: int | None


class Schedule(NamedTuple):
    """One grid step of a kernel.

    Attributes:
      straight: bundles outside loops.
      loops: the loops inside the grid's.
    """

    straight: int
    loops: tuple[Loop, ...]

    def cycles(self, *, first: int, last: int) -> tuple[int, int]:
        """Of every grid step, and of the first and last loops, which run once for 128 channels."""
        each = [loop.bundles * (loop.trips or 1) for loop in self.loops]
        once = sum(each[:first]) + sum(each[len(each) - last :])
        return self.straight + sum(each) - once, once


def read_schedule(text: str) -> Schedule:
    """The schedule in one of libtpu's dumps "...-final_bundles.txt"."""
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
    raise ValueError(f"the loop that begins at bundle {head} has no end")


def count_xla_cycles(hlo: str) -> int:
    """The compiler's cycles of all operations of an optimized module, kernels excepted."""
    own: dict[str, int] = {}
    calls: dict[str, list[tuple[str, int]]] = {}
    name = entry = ""
    for line in hlo.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if header:
            name = header[2]
            entry = name if header[1] else entry
            own[name], calls[name] = 0, []
            continue
        cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
        if cycles and name and "custom-call" not in line:
            own[name] += int(cycles[1])
        body = re.search(r"while\(.*body=%?([\w.-]+)", line)
        if body and name:
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            calls[name].append((body[1], int(trips[1]) if trips else 1))

    def total(computation: str) -> int:
        return own[computation] + sum(n * total(called) for called, n in calls[computation])

    return total(entry)


class Operation(NamedTuple):
    """An operation at one shape, with bfloat16 x.

    Attributes:
      call: y from an implementation's name, x and parameters.
      shape: of x.
      parameters: shapes of the parameters, float32.
      kernels: names of the forward and the backward kernel.
      cycles: cycles of a token from the device kind and the schedules of both kernels.
      floor_bytes: of a token's channel that must move, forward and backward.
    """

    call: Callable[[Any, Any, Any], Any]
    shape: tuple[int, int, int]
    parameters: Any
    kernels: tuple[str, str]
    cycles: Callable[[str, list[Schedule]], list[float]]
    floor_bytes: tuple[int, int]


def cema_operation(rows: int, length: int, channels: int) -> Operation:
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
    return Operation(
        lambda name, x, params: cema(x, params, implementation=name).y,
        (rows, length, channels),
        parameters,
        ("cema_forward", "cema_backward"),
        cycles,
        # x, y; x, dy, dx; and one byte of states, kept for the backward pass, in each.
        (5, 7),
    )


def timestep_norm_operation(rows: int, length: int, channels: int, groups: int) -> Operation:
    """TimestepNorm of so many groups."""
    blocks = choose_blocks(length, groups, channels // groups, 2)
    if blocks is None:
        raise ValueError(f"{groups} groups of {channels} channels do not fit into a TPU")

    def cycles(kind: str, schedules: list[Schedule]) -> list[float]:
        steps = [sum(schedule.cycles(first=0, last=0)) for schedule in schedules]
        print(f"{kind}: {steps} cycles for {blocks.tokens} tokens of {blocks.channels} channels")
        tiles = -(-length // blocks.tokens)
        return [step * tiles / length * channels / blocks.channels for step in steps]

    return Operation(
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
    """What one pass over x costs, in nanoseconds a token.

    Attributes:
      kernel: of the Pallas kernels.
      around: of what surrounds them.
      xla: of plain JAX doing the same.
      floor: of moving what must be moved.
    """

    kernel: float
    around: float
    xla: float
    floor: float


def estimate(chip: str, operation: Operation, dumps: Path) -> dict[str, Estimate]:
    """Estimates for the forward pass, and for the forward and the backward pass.

    Args:
      chip: a key of `TOPOLOGIES`.
      operation: what to compile.
      dumps: the directory that libtpu was told to write to, empty.
    """
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]
    pallas, xla = (
        [count_xla_cycles(text) for text in _compile_passes(operation, name, device)]
        for name in ("pallas_tpu", "xla")
    )
    schedules = []
    for name in operation.kernels:
        # The forward kernel is there twice: with and without states for the backward one.
        paths = sorted(dumps.glob(f"*{name}*-final_bundles.txt"))
        path = next(path for path in paths if "schedule-analysis" not in path.name)
        schedules.append(read_schedule(path.read_text()))
    cycles = operation.cycles(device.device_kind, schedules)
    kernels = [cycles[0], cycles[0] + cycles[1]]
    clock, bandwidth = CLOCKS[chip], BANDWIDTHS[chip]
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
    operation: Operation, implementation: Literal["pallas_tpu", "xla"], device: Any
) -> tuple[str, str]:
    """Optimized modules of the forward pass, and of the forward and the backward pass."""
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
    # Without the mesh, Pallas asks the process's own backend what to compile for.
    with jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh):
        lowered = (jax.jit(forward).lower(x, params), jax.jit(both).lower(x, params, x))
    first, second = (each.compile().as_text() or "" for each in lowered)
    return first, second


def main() -> None:
    """Prints a table for every chip asked for."""
    parser = argparse.ArgumentParser(description="Cycles by the TPU compiler's estimates.")
    parser.add_argument("chips", nargs="*", default=["v5e", "v6e"], help=", ".join(TOPOLOGIES))
    parser.add_argument("--op", choices=("cema", "timestep_norm"), default="cema")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=16_384)
    parser.add_argument("--channels", type=int, default=4_096)
    parser.add_argument("--groups", type=int, default=64, help="of timestep_norm")
    options = parser.parse_args()
    unknown = set(options.chips) - set(TOPOLOGIES)
    if unknown:
        parser.error(f"unknown {', '.join(sorted(unknown))}; use {', '.join(TOPOLOGIES)}")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    shape = (options.rows, options.length, options.channels)
    if options.op == "cema":
        operation = cema_operation(*shape)
    else:
        operation = timestep_norm_operation(*shape, options.groups)
    print(f"{options.op} {shape} bfloat16, ns a token")
    with tempfile.TemporaryDirectory() as directory:
        # libtpu reads it once, when the first topology is made.
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true "
            "--xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"
        )
        for chip in options.chips:
            estimates = estimate(chip, operation, Path(directory))
            print(f"| {chip} | memory floor | kernels | around them | plain JAX |")
            for kind, each in estimates.items():
                print(
                    f"| {kind} | {each.floor:.3g} | {each.kernel:.3g} | {each.around:.3g} "
                    f"| {each.xla:.3g} |"
                )
            for path in Path(directory).iterdir():
                path.unlink()


if __name__ == "__main__":
    main()
