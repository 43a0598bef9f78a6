"""Compiles the real training step for a machine that is not there, and counts what it costs."""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from megalodon_jax.chips import Machine, describe_machine
from megalodon_jax.config import TrainConfig
from megalodon_jax.models import abstract_model
from megalodon_jax.parallel.mesh import make_mesh
from megalodon_jax.parallel.sharding import batch_sharding
from megalodon_jax.plan.costs import Kernel, count_hbm_bytes, estimated_cycles, find_kernels
from megalodon_jax.plan.hlo import Collective, count_dot_flops, find_collectives, parse_program
from megalodon_jax.plan.roofline import Roofline, make_roofline
from megalodon_jax.train_state import TrainState, abstract_state
from megalodon_jax.training.metrics import model_flops_per_token
from megalodon_jax.training.step import make_train_step
from megalodon_jax.typing import Batch

# What the compilers say of a program for which a device's memory is too small.
_TOO_LARGE = re.compile(r"RESOURCE_EXHAUSTED|[Oo]ut of memory|exceeds .*memory", re.DOTALL)
_OPERATIONS = ("cema", "timestep_norm", "chunk_attention", "rowwise")

type Progress = Callable[[str], None]


@dataclass(frozen=True)
class Memory:
    """Bytes of one device's memory.

    Attributes:
      parameters: the model's.
      optimizer: the optimizer's moments and counts.
      arguments: all that the step is called with: parameters, optimizer state, the batch.
      outputs: results that do not take the place of an argument.
      temporaries: everything in between, as the compiler adds it up.
      code: the program; TPUs keep it in the same memory.
      peak: the most that is in use at once, as the compiler says.
      available: what the chip has.
    """

    parameters: int
    optimizer: int
    arguments: int
    outputs: int
    temporaries: int
    code: int
    peak: int
    available: int


@dataclass(frozen=True)
class Traffic:
    """Collective operations of one kind over the same mesh axes, in one step.

    Attributes:
      kind: such as "all-gather".
      axes: mesh axes, joined by "+".
      count: executions.
      bytes: payload per device, all executions together (`hlo.Collective.bytes`).
      sent_bytes: what a device sends, all executions together (`hlo.Collective.sent_bytes`).
    """

    kind: str
    axes: str
    count: int
    bytes: int
    sent_bytes: int


@dataclass(frozen=True)
class Plan:
    """What one training step costs; everything but `tokens_per_step` is per device.

    Attributes:
      chip: kind of chip.
      devices: their number, over all slices.
      mesh: sizes of the mesh's axes.
      remat: what the backward pass computes again.
      batch: (accumulated batches, rows of a batch, tokens of a row).
      tokens_per_step: tokens that a step trains on, on all devices.
      fits: whether it compiles and its peak is within the chip's memory.
      problem: why it does not fit, in the compiler's words; empty if it does.
      memory: None where the compiler refused.
      trace_seconds: tracing and lowering.
      compile_seconds: compiling.
      implementations: of every operation of `pallas_kernels`, with the kernels' calls.
      collectives: largest first.
      model_flops_per_token: `metrics.model_flops_per_token`, on one device as on all.
      compiled_flops_per_token: matrix products in the program with loops counted fully, plus the
        kernels', on all devices; recomputation counts.
      hbm_bytes: read and written in one step, by `costs.count_hbm_bytes`.
      roofline: estimated times; None where the compiler refused.
      notes: what the numbers leave out.
    """

    chip: str
    devices: int
    mesh: dict[str, int]
    remat: str
    batch: tuple[int, int, int]
    tokens_per_step: int
    fits: bool
    problem: str
    memory: Memory | None
    trace_seconds: float
    compile_seconds: float
    implementations: dict[str, str]
    collectives: tuple[Traffic, ...]
    model_flops_per_token: float
    compiled_flops_per_token: float
    hbm_bytes: int
    roofline: Roofline | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts and lists of numbers and texts, for JSON; the inverse of `from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> Self:
        """A plan from the JSON of `to_dict`."""
        import cattrs

        return cattrs.structure(table, cls)


def make_plan(
    config: TrainConfig, devices: Sequence[Any], *, progress: Progress = lambda _: None
) -> Plan:
    """Compiles the step of a run for `devices` and counts what it costs.

    Args:
      config: the run; nothing of its data is read.
      devices: what to compile for, such as `topologies.find_devices` gives.
      progress: called with a line of text when something long begins.

    Raises:
      ConfigError: the run cannot be split over the mesh, or nothing is known of the chip.
    """
    mesh = make_mesh(config.mesh, devices)
    machine = describe_machine(mesh)
    state = abstract_state(config, mesh)
    started = time.monotonic()
    progress(f"tracing the step for {mesh.size} x {machine.chip.name}, {_sizes(mesh)}")
    graphdef = abstract_model(config.model)[0]
    step: Any = make_train_step(graphdef, config, mesh)
    lowered = step.lower(state, _abstract_batch(config, mesh))
    traced = time.monotonic()
    progress("compiling")
    blank = _blank(config, machine, traced - started)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not _TOO_LARGE.search(str(error)):
            raise
        seconds = time.monotonic() - traced
        return dataclasses.replace(blank, problem=_reason(str(error)), compile_seconds=seconds)
    plan = dataclasses.replace(blank, compile_seconds=time.monotonic() - traced)
    progress("reading the program")
    return _filled(plan, config, machine, state, compiled)


def _blank(config: TrainConfig, machine: Machine, seconds: float) -> Plan:
    """A plan before anything is known of the program."""
    rows = (config.optim.accumulate_steps, config.data.batch_size, config.data.seq_len)
    return Plan(
        chip=machine.chip.name,
        devices=machine.mesh.size,
        mesh=dict(machine.mesh.shape),
        remat=config.model.remat,
        batch=rows,
        tokens_per_step=math.prod(rows),
        fits=False,
        problem="",
        memory=None,
        trace_seconds=seconds,
        compile_seconds=0.0,
        implementations={},
        collectives=(),
        model_flops_per_token=model_flops_per_token(config.model, seq_len=config.data.seq_len),
        compiled_flops_per_token=0.0,
        hbm_bytes=0,
        roofline=None,
        notes=(),
    )


def _filled(
    plan: Plan,
    config: TrainConfig,
    machine: Machine,
    state: TrainState,
    compiled: jax.stages.Compiled,
) -> Plan:
    program = parse_program(compiled.as_text() or "")
    memory = _memory(compiled, state, machine)
    shape = machine.mesh.shape
    local_tokens = plan.batch[1] * plan.batch[2] * shape["model"] // machine.mesh.size
    kernels = find_kernels(program, config.model, tokens=local_tokens, parts=shape["model"])
    flops = count_dot_flops(program) + sum(kernel.count * kernel.flops for kernel in kernels)
    found = find_collectives(program, machine.mesh)
    hbm_bytes = count_hbm_bytes(program)
    problem = ""
    if memory.peak > memory.available:
        problem = f"needs {memory.peak:,} bytes of a device's {memory.available:,}"
    return dataclasses.replace(
        plan,
        fits=not problem,
        problem=problem,
        memory=memory,
        implementations=_implementations(config, kernels),
        collectives=_summed(found),
        compiled_flops_per_token=flops * machine.mesh.size / plan.tokens_per_step,
        hbm_bytes=hbm_bytes,
        roofline=make_roofline(
            machine,
            flops=flops,
            hbm_bytes=hbm_bytes,
            collectives=found,
            cycles=estimated_cycles(program),
            tokens=plan.tokens_per_step,
        ),
        notes=tuple(f"counted once, its length is not constant: {n}" for n in program.unknown_loops)
        + _unstated(kernels),
    )


def _abstract_batch(config: TrainConfig, mesh: Mesh) -> Batch:
    shape = (config.optim.accumulate_steps, config.data.batch_size, config.data.seq_len)
    place = batch_sharding(mesh, leading=1)

    def array(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    integers = [array(jnp.int32) for _ in range(3)]
    return Batch(*integers, weights=array(jnp.float32))


def _memory(compiled: jax.stages.Compiled, state: TrainState, machine: Machine) -> Memory:
    stats = compiled.memory_analysis()
    if stats is None:
        raise RuntimeError(f"the compiler for {machine.chip.name} says nothing of memory")
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return Memory(
        parameters=_local_bytes(state.params),
        optimizer=_local_bytes(state.opt_state),
        arguments=stats.argument_size_in_bytes,
        outputs=outputs,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        peak=stats.peak_memory_in_bytes,
        available=int(machine.hbm_bytes),
    )


def _local_bytes(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _implementations(config: TrainConfig, kernels: Sequence[Kernel]) -> dict[str, str]:
    names = {"chunk_attention": "attention_implementation"}
    result = {}
    for operation in _OPERATIONS:
        own = [kernel for kernel in kernels if kernel.operation == operation]
        if own:
            calls = sum(kernel.count for kernel in own)
            result[operation] = f"{own[0].implementation} ({calls} calls)"
        else:
            chosen = getattr(config.model, names.get(operation, f"{operation}_implementation"))
            result[operation] = chosen or "xla"
    return result


def _summed(found: Sequence[Collective]) -> tuple[Traffic, ...]:
    groups: dict[tuple[str, str], list[Collective]] = {}
    for one in found:
        groups.setdefault((one.kind, "+".join(one.axes)), []).append(one)
    sums = [
        Traffic(
            kind,
            axes,
            count=sum(one.count for one in group),
            bytes=sum(one.count * one.bytes for one in group),
            sent_bytes=round(sum(one.count * one.sent_bytes for one in group)),
        )
        for (kind, axes), group in groups.items()
        if axes
    ]
    return tuple(sorted(sums, key=lambda one: -one.sent_bytes))


def _unstated(kernels: Sequence[Kernel]) -> tuple[str, ...]:
    names = sorted({kernel.name for kernel in kernels if not kernel.flops})
    return (f"FLOPs not stated, counted as 0: {', '.join(names)}",) if names else ()


def _reason(message: str) -> str:
    """The sentences of a compiler's message that say how much is missing."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return " ".join(lines[:6])


def _sizes(mesh: Mesh) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "alone"
