"""Speed and memory of whole training steps on this machine's first device.

    megalodon bench train                                       # every case of the table
    megalodon bench train --preset mega200M --rows 8 --length 2048 --profile

The step is the training loop's own: forward, backward, clipping, AdamW, float32 weights, bfloat16
compute, on random tokens. As in the loop, the device is given a step before it has ended the one
before; the median of `--steps` steps after three to warm up, by host clock. MFU counts the FLOPs of
`model_flops_per_token` over the data sheet's peak, and over what a large matrix product reaches in
the same run. JAX is given 95 % of a GPU's memory, unless XLA_PYTHON_CLIENT_MEM_FRACTION says
otherwise; a case that does not fit is reported so.
"""

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import numpy as np
from jax.sharding import Mesh

from megalodon_jax.bench.ceilings import measure_ceilings
from megalodon_jax.bench.kernel_times import KernelTimes, kernel_times
from megalodon_jax.config import DataConfig, ModelConfig, Remat, TrainConfig
from megalodon_jax.models import abstract_model
from megalodon_jax.parallel.mesh import resolve_mesh
from megalodon_jax.parallel.sharding import batch_sharding
from megalodon_jax.presets import preset_names
from megalodon_jax.train_state import TrainState, abstract_state, init_state
from megalodon_jax.training.metrics import PEAK_FLOPS, model_flops_per_token
from megalodon_jax.training.step import make_train_step
from megalodon_jax.typing import Batch

WARM_UP = 3


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
      preset: name of the model.
      rows: B.
      length: L.
      remat: see `ModelConfig.remat`.
      documents: documents of equal length packed into a row; 0: rows have no segment ids.
      scan_layers: see `ModelConfig.scan_layers`.
    """

    preset: str
    rows: int
    length: int
    remat: Remat = "none"
    documents: int = 0
    scan_layers: bool = False

    def __str__(self) -> str:
        packed = f", {self.documents} documents a row" if self.documents else ""
        loop = ", scanned" if self.scan_layers else ""
        return f"{self.preset} ({self.rows}, {self.length}) remat {self.remat}{packed}{loop}"

    def config(self) -> TrainConfig:
        """The run that the step belongs to."""
        model = ModelConfig.from_preset(
            self.preset, dtype="bfloat16", remat=self.remat, scan_layers=self.scan_layers
        )
        data = DataConfig(batch_size=self.rows, seq_len=self.length)
        return TrainConfig(model=model, data=data, loss_chunk_size=8192)


CASES = (
    Case("mega200M", 8, 2048),
    Case("mega200M", 8, 2048, documents=8),
    Case("mega200M", 4, 8192),
    Case("mega200M", 1, 32_768),
    Case("mega1.3B", 4, 4096),
    Case("mega1.3B", 1, 32_768),
    Case("mega1.3B", 1, 131_072, remat="inputs"),
)


@dataclasses.dataclass(frozen=True)
class StepTiming:
    """One measured step.

    Attributes:
      tokens_per_second: over the median step.
      flops_per_second: model FLOPs at that rate.
      peak_bytes: what the compiler plans on one device, weights and optimizer state included.
      argument_bytes: weights, optimizer state and batch.
      compile_seconds: time to trace and compile.
      kernels: if asked for, where the time went.
    """

    tokens_per_second: float
    flops_per_second: float
    peak_bytes: int
    argument_bytes: int
    compile_seconds: float
    kernels: list[KernelTimes]


class LoweredStep(NamedTuple):
    """A step that is traced, ready to be compiled: in another thread, if several are.

    Attributes:
      config: the run it belongs to.
      mesh: its devices.
      batch: what it is called with, on the host.
      lowered: the step.
      seconds: how long tracing took.
    """

    config: TrainConfig
    mesh: Mesh
    batch: Batch
    lowered: Any
    seconds: float

    def compile(self) -> tuple[jax.stages.Compiled, float]:
        """The step, and the seconds that it took to compile."""
        started = time.perf_counter()
        return self.lowered.compile(), time.perf_counter() - started


def lower_step(config: TrainConfig, *, documents: int = 0) -> LoweredStep:
    """Traces a run's step over its mesh; rows have `documents` documents, 0: no segment ids."""
    started = time.perf_counter()
    data, mesh = config.data, resolve_mesh(config)
    batch = random_batch(data.batch_size, data.seq_len, config.model.vocab_size, documents)
    place = batch_sharding(mesh, leading=1)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), batch
    )
    graphdef = abstract_model(config.model)[0]
    step: Any = make_train_step(graphdef, config, mesh)
    lowered = step.lower(abstract_state(config, mesh), shapes)
    return LoweredStep(config, mesh, batch, lowered, time.perf_counter() - started)


def time_step(
    config: TrainConfig, *, documents: int = 0, steps: int = 10, profile: bool = False
) -> StepTiming:
    """Times a step over the run's mesh.

    Rows have `documents` documents; 0: no segment ids.
    """
    step = lower_step(config, documents=documents)
    return time_compiled(step, *step.compile(), steps=steps, profile=profile)


def time_compiled(
    step: LoweredStep,
    compiled: jax.stages.Compiled,
    compile_seconds: float,
    *,
    steps: int = 10,
    profile: bool = False,
) -> StepTiming:
    """Times a step that is compiled, from fresh weights."""
    config, mesh = step.config, step.mesh
    batch = jax.device_put(step.batch, batch_sharding(mesh, leading=1))
    state = init_state(config, mesh)[1]
    ends: list[float] = []
    before = None
    for _ in range(WARM_UP + steps + 1):
        state, metrics = compiled(state, batch)
        if before is not None:
            jax.block_until_ready(before)
            ends.append(time.perf_counter())
        before = metrics
    jax.block_until_ready(state)
    seconds = [end - start for start, end in itertools.pairwise(ends[WARM_UP - 1 :])]
    rows, length = config.data.batch_size, config.data.seq_len
    tokens_per_second = rows * length / statistics.median(seconds)
    memory = compiled.memory_analysis()
    assert memory is not None
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return StepTiming(
        tokens_per_second,
        tokens_per_second * model_flops_per_token(config.model, seq_len=length),
        memory.temp_size_in_bytes + memory.argument_size_in_bytes + results,
        memory.argument_size_in_bytes,
        step.seconds + compile_seconds,
        kernel_times(_stepper(compiled, state, batch)) if profile else [],
    )


def random_batch(rows: int, length: int, vocab_size: int, documents: int) -> Batch:
    """One batch (1, B, L) of random tokens in `documents` documents; 0: no segment ids."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, (1, rows, length + 1))
    numbers = np.arange(length) * max(1, documents) // length + 1
    batch = Batch(
        jax.numpy.asarray(tokens[..., :-1], "int32"),
        jax.numpy.asarray(tokens[..., 1:], "int32"),
        jax.numpy.asarray(np.broadcast_to(numbers, (1, rows, length)), "int32"),
        jax.numpy.ones((1, rows, length), "float32"),
    )
    return batch if documents else batch._replace(segment_ids=None)


def _stepper(compiled: jax.stages.Compiled, state: TrainState, batch: Batch):
    """A function that goes on training: every step takes the state of the one before."""
    newest = [state]

    def step() -> TrainState:
        newest[0] = compiled(newest[0], batch)[0]
        return newest[0]

    return step


def run(options: argparse.Namespace) -> list[StepTiming]:
    """Measures what the options choose, printing every row as it comes."""
    kind = jax.devices()[0].device_kind
    best = measure_ceilings(matrix_size=512 if options.small else 8192).flops_per_second
    print(f"{kind}, jax {jax.__version__}, matmul {best / 1e12:,.1f} TFLOP/s", flush=True)
    timings, report = [], []
    for case in _chosen(options):
        config = small(case.config()) if options.small else case.config()
        row: dict[str, Any] = {"case": dataclasses.asdict(case)}
        report.append(row)
        try:
            timing = time_step(
                config, documents=case.documents, steps=options.steps, profile=options.profile
            )
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            row["reason"] = str(error).splitlines()[0]
            print(f"{case}: {row['reason']}", flush=True)
        else:
            timings.append(timing)
            row.update(dataclasses.asdict(timing))
            print(_format(case, timing, kind, best), flush=True)
        if options.json:
            text = json.dumps({"device": kind, "matmul": best, "steps": report}, indent=1)
            Path(options.json).write_text(text + "\n")
    return timings


def _chosen(options: argparse.Namespace) -> list[Case]:
    if options.preset is None:
        return [dataclasses.replace(case, scan_layers=options.scan_layers) for case in CASES]
    return [
        Case(
            options.preset,
            options.rows,
            options.length,
            options.remat,
            options.documents,
            options.scan_layers,
        )
    ]


def small(config: TrainConfig) -> TrainConfig:
    """The run in the shape of a model that a CPU trains."""
    model = dataclasses.replace(
        config.model, num_layers=2, model_dim=64, z_dim=32, value_dim=128, ffn_hidden_dim=128,
        chunk_size=64, vocab_size=256, norm_num_groups=8,
    )  # fmt: skip
    return dataclasses.replace(config, model=model, data=DataConfig(batch_size=2, seq_len=128))


def _format(case: Case, timing: StepTiming, kind: str, best: float) -> str:
    peak = PEAK_FLOPS.get(kind)
    mfu = "" if peak is None else f"MFU {timing.flops_per_second / peak:.1%} (data sheet), "
    line = (
        f"{case}: {timing.tokens_per_second:,.0f} tokens/s, {mfu}"
        f"{timing.flops_per_second / best:.1%} of this device's matmul, "
        f"peak {timing.peak_bytes / 1e9:.1f} GB (state {timing.argument_bytes / 1e9:.1f}), "
        f"compiled in {timing.compile_seconds:.0f} s"
    )
    for row in timing.kernels:
        line += f"\n  {row.kind:16} {row.seconds * 1e3:9.2f} ms {row.launches:7.0f} launches"
    return line


def use_all_memory() -> None:
    """Lets JAX have 95 % of a GPU's memory, unless the environment says otherwise."""
    # Read when the first device is asked for.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="megalodon bench train", description="Measures training steps of the presets."
    )
    parser.add_argument("--preset", choices=preset_names(), help="default: a table of cases")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--remat", choices=get_args(Remat), default="none")
    parser.add_argument(
        "--documents", type=int, default=0, help="packed into a row; 0: no segment ids"
    )
    parser.add_argument(
        "--scan_layers", action="store_true", help="one loop over the blocks: compiles sooner"
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--profile", action="store_true", help="GPU time by kind of kernel")
    parser.add_argument("--small", action="store_true", help="a shape for a CPU")
    parser.add_argument("--json", metavar="FILE", help="write the measurements there too")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; argv without the program's name, None: that of the process."""
    use_all_memory()
    run(make_parser().parse_args(argv))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
