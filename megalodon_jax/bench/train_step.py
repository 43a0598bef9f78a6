"""Tokens per second and memory of a whole training step on this machine's device.

    python -m megalodon_jax.bench.train_step --preset mega200M --rows 8 --length 2048 --remat dots

The step is the training loop's own: forward, backward, clipping, AdamW, float32 weights, bfloat16
compute, on random tokens. The median of `--steps` steps after three to warm up, by host clock.
"""

import argparse
import statistics
import time
from typing import NamedTuple, get_args

import jax
import numpy as np

from megalodon_jax.config import DataConfig, ModelConfig, Remat, TrainConfig, preset_names
from megalodon_jax.training.metrics import model_flops_per_token, model_flops_utilization
from megalodon_jax.training.step import init_state, make_train_step
from megalodon_jax.typing import Batch

WARM_UP = 3


class StepTiming(NamedTuple):
    """One measured configuration.

    Attributes:
      tokens_per_second: over the median step.
      utilization: model FLOPs over the device's peak; None where the peak is unknown.
      temporary_bytes: memory the compiled step needs beside its arguments.
      argument_bytes: weights, optimizer state and batch.
      compile_seconds: time to trace and compile.
    """

    tokens_per_second: float
    utilization: float | None
    temporary_bytes: int
    argument_bytes: int
    compile_seconds: float


def time_step(config: TrainConfig, *, documents: int = 1, steps: int = 10) -> StepTiming:
    """Times a step on rows that hold `documents` documents of equal length each."""
    rows, length = config.data.batch_size, config.data.seq_len
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (1, rows, length + 1))
    numbers = np.minimum(np.arange(length) * documents // length + 1, documents)
    batch = Batch(
        jax.numpy.asarray(tokens[..., :-1], "int32"),
        jax.numpy.asarray(tokens[..., 1:], "int32"),
        jax.numpy.asarray(np.broadcast_to(numbers, (1, rows, length)), "int32"),
        jax.numpy.ones((1, rows, length), "float32"),
    )
    graphdef, state = init_state(config)
    started = time.perf_counter()
    compiled = jax.jit(make_train_step(graphdef, config), donate_argnums=0)
    compiled = compiled.lower(state, batch).compile()
    compile_seconds = time.perf_counter() - started
    seconds = []
    for _ in range(WARM_UP + steps):
        started = time.perf_counter()
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - started)
    tokens_per_second = rows * length / statistics.median(seconds[WARM_UP:])
    memory = compiled.memory_analysis()
    assert memory is not None
    return StepTiming(
        tokens_per_second,
        model_flops_utilization(
            tokens_per_second,
            model_flops_per_token(config.model, seq_len=length),
            device_kind=jax.devices()[0].device_kind,
            device_count=1,
        ),
        memory.temp_size_in_bytes,
        memory.argument_size_in_bytes,
        compile_seconds,
    )


def main() -> None:
    """Times a training step of a preset and prints one line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--preset", choices=preset_names(), default="mega200M")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--remat", choices=get_args(Remat), default="none")
    parser.add_argument("--documents", type=int, default=1, help="documents packed into a row")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    config = TrainConfig(
        model=ModelConfig.from_preset(options.preset, dtype="bfloat16", remat=options.remat),
        data=DataConfig(batch_size=options.rows, seq_len=options.length),
        loss_chunk_size=8192,
    )
    timing = time_step(config, documents=options.documents, steps=options.steps)
    used = "" if timing.utilization is None else f"  MFU {timing.utilization:.1%}"
    print(
        f"{options.preset} ({options.rows}, {options.length}) remat {options.remat}, "
        f"{options.documents} documents a row on {jax.devices()[0].device_kind}: "
        f"{timing.tokens_per_second:,.0f} tokens/s{used}  temporaries "
        f"{timing.temporary_bytes / 1e9:.1f} GB, arguments {timing.argument_bytes / 1e9:.1f} GB, "
        f"compiled in {timing.compile_seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
