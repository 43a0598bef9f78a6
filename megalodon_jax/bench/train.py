r"""Speed and memory of whole training steps, on one device or over a mesh.

    megalodon bench train                                       # every case of the table
    megalodon bench train --preset mega200M --rows 8 --length 2048 --profile
    megalodon bench train --preset mega200M --length 2048 8192 32768 --tokens 32768 \
        --against transformer                                   # and the Transformer beside it
    megalodon bench train --preset mega200M --rows 1 --length 1048576 --mesh.chunk 4 --plan

The step is the training loop's own: forward, backward, clipping, AdamW, float32 weights, bfloat16
compute, on random tokens. As in the loop, every step is dispatched before the previous one ends;
the time is the median of `steps` steps after three for warm-up, by the host's clock. MFU divides
the FLOPs of `model_flops_per_token` by the data sheet's peak; a second share divides them by the
rate of a large matrix product in the same run. JAX may use 95 % of a GPU's memory, unless
XLA_PYTHON_CLIENT_MEM_FRACTION is set; a case that does not fit is reported.
"""

import dataclasses
import itertools
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from megalodon_jax.bench.ceilings import measure_ceilings
from megalodon_jax.bench.kernel_times import KernelTimes, kernel_times
from megalodon_jax.bench.options import BenchTrainOptions
from megalodon_jax.compiled.memory import read_memory
from megalodon_jax.config import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    Remat,
    TrainConfig,
    model_preset,
)
from megalodon_jax.config.model import DType
from megalodon_jax.errors import ConfigError
from megalodon_jax.flops import model_flops_per_token, model_flops_utilization
from megalodon_jax.models import abstract_model
from megalodon_jax.parallel.mesh import mesh_sizes, resolve_mesh
from megalodon_jax.parallel.sharding import batch_sharding
from megalodon_jax.plan.plan import Plan, read_plan
from megalodon_jax.train_state import TrainState, abstract_state, init_state
from megalodon_jax.training.step import make_train_step
from megalodon_jax.typing import Batch
from pallas_kernels.common.dispatch import Implementation

WARM_UP_STEPS = 3


@dataclasses.dataclass(frozen=True)
class TrainCase:
    """One measured run.

    Attributes:
      preset: name of the model size.
      rows: rows B of the batch.
      length: tokens L of a row.
      remat: see `ModelConfig.remat`.
      documents: documents of equal length packed into a row; 0: no segment ids.
      scan_layers: see `ModelConfig.scan_layers`.
      mesh: the devices.
      reduce_dtype: see `ModelConfig.reduce_dtype`.
      implementation: see `ModelConfig.implementation`.
    """

    preset: str
    rows: int
    length: int
    remat: Remat = "none"
    documents: int = 0
    scan_layers: bool = False
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    reduce_dtype: DType = "float32"
    implementation: Implementation | None = None

    def __str__(self) -> str:
        packed = f", {self.documents} documents a row" if self.documents else ""
        loop = ", scanned" if self.scan_layers else ""
        sizes = dataclasses.asdict(self.mesh).items()
        mesh = "".join(f", {axis} {size}" for axis, size in sizes if size != 1)
        kernels = f", {self.implementation}" if self.implementation else ""
        shape = f"{self.preset} ({self.rows}, {self.length}) remat {self.remat}"
        return f"{shape}{packed}{loop}{mesh}{kernels}"

    def config(self) -> TrainConfig:
        """The configuration of the run."""
        model = model_preset(
            self.preset,
            dtype="bfloat16",
            reduce_dtype=self.reduce_dtype,
            remat=self.remat,
            scan_layers=self.scan_layers,
            **({"implementation": self.implementation} if self.implementation else {}),
        )
        data = DataConfig(batch_size=self.rows, seq_len=self.length)
        return TrainConfig(model=model, data=data, mesh=self.mesh, loss_chunk_size=8192)


CASES = (
    TrainCase("mega200M", 8, 2048),
    TrainCase("mega200M", 8, 2048, documents=8),
    TrainCase("mega200M", 4, 8192),
    TrainCase("mega200M", 1, 32_768),
    TrainCase("mega1.3B", 4, 4096),
    TrainCase("mega1.3B", 1, 32_768),
    TrainCase("mega1.3B", 1, 131_072, remat="inputs"),
)


# Transformers of the same depth, width and, but for the largest, number of parameters.
TRANSFORMERS = {
    "mega30M": "transformer30M",
    "mega200M": "transformer200M",
    "mega1.3B": "transformer1.3B",
    "mega7.1B": "transformer7B",
    "mega7.3B": "transformer7B",
    "paper_7b": "transformer7B",
}


@dataclasses.dataclass(frozen=True)
class StepTiming:
    """One measured step.

    Attributes:
      tokens_per_second: rate of the median step, of all devices.
      flops_per_second: model FLOPs at that rate.
      peak_bytes: memory of one device by the compiler, weights and optimizer state included.
      argument_bytes: weights, optimizer state and batch on one device.
      compile_seconds: time to trace and compile.
      kernels: with `profile`, the time by kind of kernel.
      devices: number of devices.
      peak_in_use: the most memory that was in use on a device, by JAX's allocator; None if it does
        not count, or if an earlier step of the process used more.
      plan: with `plan`, what `megalodon plan` reads in the program.
    """

    tokens_per_second: float
    flops_per_second: float
    peak_bytes: int
    argument_bytes: int
    compile_seconds: float
    kernels: list[KernelTimes]
    devices: int = 1
    peak_in_use: int | None = None
    plan: Plan | None = None

    @property
    def seconds(self) -> float | None:
        """Seconds of the median step; None without a plan, which knows the step's tokens."""
        return None if self.plan is None else self.plan.tokens_per_step / self.tokens_per_second


class LoweredStep(NamedTuple):
    """A traced step, ready to be compiled, in another thread if there are several.

    Attributes:
      config: the run.
      mesh: the run's devices.
      batch: the step's batch, on the host.
      lowered: the step.
      seconds: time to trace it.
    """

    config: TrainConfig
    mesh: Mesh
    batch: Batch
    lowered: Any
    seconds: float

    def compile(self) -> tuple[jax.stages.Compiled, float]:
        """The compiled step, and the seconds of its compilation."""
        started = time.perf_counter()
        return self.lowered.compile(), time.perf_counter() - started


def lower_step(config: TrainConfig, *, documents: int = 0, mesh: Mesh | None = None) -> LoweredStep:
    """Traces a run's step over its mesh.

    Args:
      config: the run.
      documents: documents packed into a row; 0: no segment ids.
      mesh: devices; None: those of `config.mesh`.
    """
    started = time.perf_counter()
    data, mesh = config.data, resolve_mesh(config, mesh)
    batch = random_batch(data.batch_size, data.seq_len, config.model.vocab_size, documents)
    sharding = batch_sharding(mesh, leading=1)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), batch
    )
    graphdef = abstract_model(config.model)[0]
    step: Any = make_train_step(graphdef, config, mesh)
    lowered = step.lower(abstract_state(config, mesh), shapes)
    return LoweredStep(config, mesh, batch, lowered, time.perf_counter() - started)


def time_step(
    config: TrainConfig,
    *,
    documents: int = 0,
    steps: int = 10,
    profile: bool = False,
    plan: bool = False,
) -> StepTiming:
    """Compiles and times a step over the run's mesh.

    Args:
      config: the run.
      documents: documents packed into a row; 0: no segment ids.
      steps: steps that are timed.
      profile: also measure the GPU time by kind of kernel.
      plan: also read what `megalodon plan` reads.
    """
    step = lower_step(config, documents=documents)
    return time_compiled(step, *step.compile(), steps=steps, profile=profile, plan=plan)


def time_compiled(
    step: LoweredStep,
    compiled: jax.stages.Compiled,
    compile_seconds: float,
    *,
    steps: int = 10,
    profile: bool = False,
    plan: bool = False,
) -> StepTiming:
    """Times a compiled step, from fresh weights."""
    config, mesh = step.config, step.mesh
    peak_before = _peak_in_use(mesh)
    batch = jax.device_put(step.batch, batch_sharding(mesh, leading=1))
    state = init_state(config, mesh)[1]
    ends: list[float] = []
    previous = None
    for _ in range(WARM_UP_STEPS + steps + 1):
        state, metrics = compiled(state, batch)
        if previous is not None:
            jax.block_until_ready(previous)
            ends.append(time.perf_counter())
        previous = metrics
    jax.block_until_ready(state)
    seconds = [end - start for start, end in itertools.pairwise(ends[WARM_UP_STEPS - 1 :])]
    rows, length = config.data.batch_size, config.data.seq_len
    tokens_per_second = rows * length / statistics.median(seconds)
    memory = read_memory(compiled)
    assert memory is not None
    peak = _peak_in_use(mesh)
    return StepTiming(
        tokens_per_second,
        tokens_per_second * model_flops_per_token(config.model, seq_len=length),
        memory.total,
        memory.arguments,
        step.seconds + compile_seconds,
        kernel_times(_training_steps(compiled, state, batch)) if profile else [],
        devices=mesh.size,
        peak_in_use=peak if peak > peak_before else None,
        plan=read_plan(config, mesh, compiled) if plan else None,
    )


def _peak_in_use(mesh: Mesh) -> int:
    """The most bytes in use on a device since the process began; 0 if nothing counts them."""
    counts = [device.memory_stats() or {} for device in mesh.devices.flat]
    return max(count.get("peak_bytes_in_use", 0) for count in counts)


def random_batch(rows: int, length: int, vocab_size: int, documents: int) -> Batch:
    """One batch (1, B, L) of random tokens; rows of `documents` documents, 0: no segment ids."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, (1, rows, length + 1))
    numbers = np.arange(length) * max(1, documents) // length + 1
    batch = Batch(
        jax.numpy.asarray(tokens[..., :-1], "int32"),
        jax.numpy.asarray(tokens[..., 1:], "int32"),
        jax.numpy.asarray(np.broadcast_to(numbers, (1, rows, length)), "int32"),
        jax.numpy.ones((1, rows, length), "float32"),
    )
    return batch if documents else batch._replace(segment_ids=None)


def _training_steps(compiled: jax.stages.Compiled, state: TrainState, batch: Batch):
    """A function that trains one step further at every call."""
    newest = [state]

    def step() -> TrainState:
        newest[0] = compiled(newest[0], batch)[0]
        return newest[0]

    return step


def run(options: BenchTrainOptions) -> int:
    """Measures the selected cases and prints every row at once; returns 0."""
    use_all_memory()
    cases = [(case, *_opponents(case, options)) for case in _selected_cases(options)]
    kind = jax.devices()[0].device_kind
    best = measure_ceilings(matrix_size=512 if options.small else 8192).flops_per_second
    print(f"{kind}, jax {jax.__version__}, matmul {best / 1e12:,.1f} TFLOP/s", flush=True)
    report = []
    for contenders in cases:
        speeds = []
        for contender in contenders:
            row, timing = _measure(contender, options)
            report.append(row)
            if timing is not None:
                speeds.append(timing.tokens_per_second)
                contender = dataclasses.replace(contender, remat=row["case"]["remat"])
                print(_format(contender, timing, kind, best), flush=True)
            else:
                print(f"{contender}: {row['reason']}", flush=True)
            if options.json:
                text = json.dumps({"device": kind, "matmul": best, "steps": report}, indent=1)
                Path(options.json).write_text(text + "\n")
        if len(speeds) == 2:
            print(f"  {speeds[0] / speeds[1]:.2f} times the speed of the Transformer", flush=True)
    return 0


def _measure(
    case: TrainCase, options: BenchTrainOptions
) -> tuple[dict[str, Any], StepTiming | None]:
    """A row of the report, with the first rematerialization policy whose step fits."""
    policies = (case.remat,) if options.preset is None else options.remat
    row: dict[str, Any] = {}
    for remat in policies:
        case = dataclasses.replace(case, remat=remat)
        row = {"case": dataclasses.asdict(case)}
        config = small(case.config()) if options.small else case.config()
        try:
            timing = time_step(
                config,
                documents=case.documents,
                steps=options.steps,
                profile=options.profile,
                plan=options.plan,
            )
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            row["reason"] = str(error).splitlines()[0]
        else:
            row.update(dataclasses.asdict(timing))
            return row, timing
    return row, None


def _selected_cases(options: BenchTrainOptions) -> list[TrainCase]:
    if options.preset is None:
        return [dataclasses.replace(case, scan_layers=options.scan_layers) for case in CASES]
    return [
        TrainCase(
            options.preset,
            max(1, options.tokens // length) if options.tokens else options.rows,
            length,
            options.remat[0],
            options.documents,
            options.scan_layers,
            options.mesh,
            options.reduce_dtype,
            options.implementation,
        )
        for length in options.length
    ]


def _opponents(case: TrainCase, options: BenchTrainOptions) -> list[TrainCase]:
    """The Transformer of the case's size, if it is asked for."""
    if options.against is None:
        return []
    if case.preset not in TRANSFORMERS:
        raise ConfigError(
            f"no Transformer has the size of {case.preset!r}; use one of {', '.join(TRANSFORMERS)}"
        )
    # A Transformer has other implementations.
    return [dataclasses.replace(case, preset=TRANSFORMERS[case.preset], implementation=None)]


def small(config: TrainConfig) -> TrainConfig:
    """The run with a model and a batch that a CPU can train."""
    if isinstance(config.model, ModelConfig):
        model = dataclasses.replace(
            config.model, num_layers=2, model_dim=64, z_dim=32, value_dim=128, ffn_hidden_dim=128,
            chunk_size=64, vocab_size=256, norm_num_groups=8,
        )  # fmt: skip
    else:
        model = dataclasses.replace(
            config.model, num_layers=2, model_dim=64, num_heads=2, ffn_hidden_dim=128,
            vocab_size=256,
        )  # fmt: skip
    sizes = mesh_sizes(config.mesh, len(jax.devices()))
    data = DataConfig(batch_size=2 * sizes["replica"] * sizes["data"], seq_len=128 * sizes["chunk"])
    return dataclasses.replace(config, model=model, data=data)


def _format(case: TrainCase, timing: StepTiming, kind: str, best: float) -> str:
    devices = timing.devices
    share = model_flops_utilization(
        timing.flops_per_second, 1.0, device_kind=kind, device_count=devices
    )
    mfu = "" if share is None else f"MFU {share:.1%} (data sheet), "
    rate = f"{timing.tokens_per_second:,.0f} tokens/s"
    if devices > 1:
        rate += f", {timing.tokens_per_second / devices:,.0f} a device"
    line = (
        f"{case}: {rate}, {mfu}"
        f"{timing.flops_per_second / devices / best:.1%} of a device's matmul, "
        f"peak {timing.peak_bytes / 1e9:.1f} GB (state {timing.argument_bytes / 1e9:.1f}), "
        f"compiled in {timing.compile_seconds:.0f} s"
    )
    if timing.plan is not None:
        line += "".join(f"\n  {row}" for row in compare_with_plan(timing, timing.plan))
    for row in timing.kernels:
        line += f"\n  {row.kind:16} {row.seconds * 1e3:9.2f} ms {row.launches:7.0f} launches"
    return line


def compare_with_plan(timing: StepTiming, plan: Plan) -> list[str]:
    """Lines with planned numbers beside those measured."""
    assert plan.memory is not None
    assert plan.roofline is not None
    in_use = timing.peak_in_use
    measured = "not measured" if in_use is None else f"{in_use / 1e9:.1f} GB in use"
    sent = sum(total.sent_bytes for total in plan.collectives)
    count = sum(total.count for total in plan.collectives)
    seconds = sum(kernel.seconds for kernel in timing.kernels if kernel.kind == "collectives")
    took = f", {seconds * 1e3:.1f} ms in them" if timing.kernels else ""
    expected = plan.roofline.expected
    estimate = "no estimate" if expected is None else f"estimated {expected * 1e3:,.1f} ms"
    return [
        f"planned peak {plan.memory.peak / 1e9:.1f} GB, {measured}",
        f"planned {count} collectives that send {sent / 1e9:.2f} GB a device{took}",
        f"planned step {plan.roofline.overlapped * 1e3:,.1f} to "
        f"{plan.roofline.serial * 1e3:,.1f} ms at data sheet rates, {estimate}, "
        f"measured {(timing.seconds or 0) * 1e3:,.1f} ms",
    ]


def use_all_memory() -> None:
    """Lets JAX use 95 % of a GPU's memory, unless the environment sets another share."""
    # JAX reads the variable when it initializes its first device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
