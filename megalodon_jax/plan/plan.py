"""Compiles the real training step for hardware you do not have, and reads what it costs."""

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

from megalodon_jax.baselines.cudnn import DOCUMENTS_PER_CALL
from megalodon_jax.compiled.collectives import Collective, find_collectives
from megalodon_jax.compiled.hlo import parse_program
from megalodon_jax.compiled.kernels import (
    KERNEL_OPERATIONS,
    CompiledKernel,
    count_estimated_cycles,
)
from megalodon_jax.compiled.matmul_flops import count_matmul_flops
from megalodon_jax.compiled.memory import read_memory
from megalodon_jax.compiled.memory_traffic import count_hbm_bytes
from megalodon_jax.config import (
    AnyEncoderConfig,
    TrainConfig,
    TransformerConfig,
    TransformerEncoderConfig,
)
from megalodon_jax.flops import model_flops_per_token
from megalodon_jax.parallel.mesh import make_mesh
from megalodon_jax.parallel.sharding import batch_sharding
from megalodon_jax.plan.costs import find_step_kernels
from megalodon_jax.plan.machine import Machine, describe_machine
from megalodon_jax.plan.roofline import Roofline, make_roofline
from megalodon_jax.train_state import TrainState, abstract_run_model, abstract_state
from megalodon_jax.training.step import make_train_step
from megalodon_jax.typing import Batch

# Messages of the compilers if a device's memory is too small for the program.
_TOO_LARGE = re.compile(r"RESOURCE_EXHAUSTED|[Oo]ut of memory|exceeds .*memory", re.DOTALL)

type Progress = Callable[[str], None]


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one device's memory.

    Attributes:
      parameters: the model's parameters.
      optimizer: the optimizer's moments and counts.
      arguments: parameters, optimizer state and the batch.
      outputs: results that are not stored in a donated argument.
      temporaries: everything else, as the compiler sums it.
      code: the program; TPUs keep it in the same memory.
      peak: the most in use at once, by the compiler.
      available: the chip's memory.
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
class CollectiveTotal:
    """All collective operations of one kind over the same mesh axes, in one step.

    Attributes:
      kind: such as "all-gather".
      axes: mesh axes, joined by "+".
      count: executions.
      bytes: payload per device, summed over the executions (`Collective.bytes`).
      sent_bytes: bytes that a device sends, summed likewise (`Collective.sent_bytes`).
    """

    kind: str
    axes: str
    count: int
    bytes: int
    sent_bytes: int


@dataclass(frozen=True)
class Plan:
    """Cost of one training step, per device unless stated otherwise.

    Attributes:
      chip: short name of the chip.
      devices: number of devices, over all slices.
      mesh: sizes of the mesh's axes.
      remat: see `ModelConfig.remat`.
      batch: (accumulated batches, rows of a batch, tokens of a row), over all devices.
      tokens_per_step: tokens that a step trains on, over all devices.
      fits: whether it compiles and its peak is within the chip's memory.
      problem: why it does not fit, in the compiler's words; empty if it does.
      memory: None if the compiler refused.
      trace_seconds: time to trace and lower.
      compile_seconds: time to compile.
      implementations: of every operation of `pallas_kernels`, with the kernels' calls.
      collectives: totals by kind and mesh axes, most bytes sent first.
      model_flops_per_token: `flops.model_flops_per_token`.
      compiled_flops_per_token: matrix products of the program, loops counted fully, plus the
        kernels', over all devices; recomputation counts.
      hbm_bytes: bytes read and written in one step (`memory_traffic.count_hbm_bytes`).
      roofline: estimated times; None if the compiler refused.
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
    memory: StepMemory | None
    trace_seconds: float
    compile_seconds: float
    implementations: dict[str, str]
    collectives: tuple[CollectiveTotal, ...]
    model_flops_per_token: float
    compiled_flops_per_token: float
    hbm_bytes: int
    roofline: Roofline | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts and lists of numbers and strings, for JSON; the inverse of `from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> Self:
        """A plan from the JSON of `to_dict`."""
        import cattrs

        return cattrs.structure(table, cls)


def make_plan(
    config: TrainConfig, devices: Sequence[Any], *, progress: Progress = lambda _: None
) -> Plan:
    """Compiles a run's training step for `devices` and reads what it costs.

    Args:
      config: the run; its data is not read.
      devices: devices to compile for, such as those of `topologies.find_devices`.
      progress: called with a line of text before every long stage.

    Raises:
      ConfigError: the run cannot be sharded over the mesh, or the chip has no data sheet.
    """
    mesh = make_mesh(config.mesh, devices)
    machine = describe_machine(mesh)
    state = abstract_state(config, mesh)
    started = time.monotonic()
    progress(f"tracing the step for {mesh.size} x {machine.chip.name}, {_sizes(mesh)}")
    graphdef = abstract_run_model(config).graphdef
    step: Any = make_train_step(graphdef, config, mesh)
    lowered = step.lower(state, _abstract_batch(config, mesh))
    traced = time.monotonic()
    progress("compiling")
    empty = _empty_plan(config, machine, traced - started)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not _TOO_LARGE.search(str(error)):
            raise
        seconds = time.monotonic() - traced
        return dataclasses.replace(empty, problem=_reason(str(error)), compile_seconds=seconds)
    plan = dataclasses.replace(empty, compile_seconds=time.monotonic() - traced)
    progress("reading the program")
    return _complete(plan, config, machine, state, compiled)


def read_plan(config: TrainConfig, mesh: Mesh, compiled: jax.stages.Compiled) -> Plan:
    """The plan of a step that is compiled already, for the devices at hand or for others.

    Args:
      config: the run.
      mesh: the devices.
      compiled: the run's step.

    Raises:
      ConfigError: the chip has no data sheet.
    """
    machine, state = describe_machine(mesh), abstract_state(config, mesh)
    return _complete(_empty_plan(config, machine, 0.0), config, machine, state, compiled)


def _empty_plan(config: TrainConfig, machine: Machine, trace_seconds: float) -> Plan:
    """A plan without the numbers that come from the compiled program."""
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
        trace_seconds=trace_seconds,
        compile_seconds=0.0,
        implementations={},
        collectives=(),
        model_flops_per_token=model_flops_per_token(config.model, seq_len=config.data.seq_len),
        compiled_flops_per_token=0.0,
        hbm_bytes=0,
        roofline=None,
        notes=(),
    )


def _complete(
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
    kernels = find_step_kernels(
        program,
        config.model,
        tokens=local_tokens,
        length=plan.batch[2],
        tensor_shards=shape["model"],
    )
    flops = count_matmul_flops(program) + sum(kernel.count * kernel.flops for kernel in kernels)
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
        collectives=_total_by_kind(found),
        compiled_flops_per_token=flops * machine.mesh.size / plan.tokens_per_step,
        hbm_bytes=hbm_bytes,
        roofline=make_roofline(
            machine,
            flops=flops,
            hbm_bytes=hbm_bytes,
            collectives=found,
            cycles=count_estimated_cycles(program),
            tokens=plan.tokens_per_step,
        ),
        notes=tuple(
            f"loop without a constant trip count, counted once: {name}"
            for name in program.unknown_loops
        )
        + _notes_on_unstated_flops(kernels)
        + _notes_on_cudnn(kernels, local_tokens * config.model.model_dim // shape["model"]),
    )


def _abstract_batch(config: TrainConfig, mesh: Mesh) -> Batch:
    shape = (config.optim.accumulate_steps, config.data.batch_size, config.data.seq_len)
    sharding = batch_sharding(mesh, leading=1)

    def array(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    integers = [array(jnp.int32) for _ in range(3)]
    batch = Batch(*integers, weights=array(jnp.float32))
    model = config.model
    if not isinstance(model, AnyEncoderConfig) or model.input == "tokens":
        return batch
    shape = (*shape, model.input_size)
    return batch._replace(tokens=array(jnp.float32))


def _memory(compiled: jax.stages.Compiled, state: TrainState, machine: Machine) -> StepMemory:
    memory = read_memory(compiled)
    if memory is None:
        raise RuntimeError(f"the compiler for {machine.chip.name} reports no memory")
    return StepMemory(
        parameters=_local_bytes((state.params, state.base)),
        optimizer=_local_bytes(state.opt_state),
        **memory._asdict(),
        available=int(machine.memory_bytes),
    )


def _local_bytes(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _implementations(config: TrainConfig, kernels: Sequence[CompiledKernel]) -> dict[str, str]:
    settings = {"chunk_attention": "attention"}
    unused = set()
    if isinstance(config.model, TransformerConfig | TransformerEncoderConfig):
        operations = ("attention", "rowwise")
    else:
        operations = KERNEL_OPERATIONS
        if config.model.moving_average == "none":
            unused.add("cema")
        if config.model.time_norm != "timestep":
            unused.add("timestep_norm")
    result = {}
    for operation in operations:
        if operation in unused:
            continue
        own = [kernel for kernel in kernels if kernel.operation == operation]
        if own:
            calls = sum(kernel.count for kernel in own)
            result[operation] = f"{own[0].implementation} ({calls} calls)"
        else:
            setting: Any = settings.get(operation, operation)
            result[operation] = config.model.implementation_of(setting) or "xla"
    return result


def _total_by_kind(found: Sequence[Collective]) -> tuple[CollectiveTotal, ...]:
    groups: dict[tuple[str, str], list[Collective]] = {}
    for collective in found:
        key = (collective.kind, "+".join(collective.axes))
        groups.setdefault(key, []).append(collective)
    totals = [
        CollectiveTotal(
            kind,
            axes,
            count=sum(each.count for each in group),
            bytes=sum(each.count * each.bytes for each in group),
            sent_bytes=round(sum(each.count * each.sent_bytes for each in group)),
        )
        for (kind, axes), group in groups.items()
        if axes
    ]
    return tuple(sorted(totals, key=lambda total: -total.sent_bytes))


def _notes_on_unstated_flops(kernels: Sequence[CompiledKernel]) -> tuple[str, ...]:
    names = sorted({kernel.name for kernel in kernels if not kernel.flops})
    return (f"kernels that state no FLOPs, counted as 0: {', '.join(names)}",) if names else ()


def _notes_on_cudnn(kernels: Sequence[CompiledKernel], local_features: int) -> tuple[str, ...]:
    if not any(kernel.implementation == "cudnn" for kernel in kernels):
        return ()
    # Measured: float32 gradients of queries for every document that a call may have.
    workspace = 4 * DOCUMENTS_PER_CALL * local_features
    return (
        f"memory is without cuDNN's workspace, about {workspace / 1e9:.1f} GB for packed rows; "
        f"rows have at most {DOCUMENTS_PER_CALL} documents",
    )


def _reason(message: str) -> str:
    """The first lines of a compiler's message, which say how much memory is missing."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return " ".join(lines[:6])


def _sizes(mesh: Mesh) -> str:
    sizes = [f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1]
    return ", ".join(sizes) or "one device"
