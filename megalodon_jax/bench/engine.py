r"""The engine under load: tokens/s over its capacity, first token, time between tokens.

    megalodon bench engine --preset mega200M --slots 64 --load 0.8 1.1 --seconds 30

Capacity is what decoding and prefill alone would give: a request costs the prefill of its prompt,
measured one after the other, and for every token of its answer a step of all slots divided by their
number. Requests then arrive by a Poisson process at shares of that rate, in real time; one thread
hands them over and steps the engine.
"""

import dataclasses
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from megalodon_jax.bench.decode import bench_config, chain_of
from megalodon_jax.bench.decode_steps import (
    BenchModel,
    DecodeProgram,
    put_in_slots,
    random_ids,
    time_steps,
)
from megalodon_jax.bench.load import Lengths, LoadResult, draw_arrivals, run_load
from megalodon_jax.bench.options import BenchEngineOptions
from megalodon_jax.bench.train import use_all_memory
from megalodon_jax.config import ModelConfig
from megalodon_jax.errors import ConfigError
from megalodon_jax.inference.engine import Engine
from megalodon_jax.inference.sampling import Features

# Requests whose prompts are prefilled alone, and of which the mean lengths are taken.
_SAMPLE = 64


class Capacity(NamedTuple):
    """Costs of decoding and prefill alone.

    Attributes:
      prefill_seconds: of a request's prompt, mean.
      step_seconds: of a step of all slots.
      slots: number of slots.
      prompt: tokens of a prompt, mean.
      answer: tokens of an answer, mean.
    """

    prefill_seconds: float
    step_seconds: float
    slots: int
    prompt: float
    answer: float

    @property
    def seconds_per_request(self) -> float:
        """Prefill, and its share of the steps of full slots."""
        return self.prefill_seconds + self.answer * self.step_seconds / self.slots

    @property
    def requests_per_second(self) -> float:
        """Requests that an engine without any overhead would finish."""
        return 1 / self.seconds_per_request

    @property
    def tokens_per_second(self) -> float:
        """Tokens of their answers."""
        return self.answer * self.requests_per_second


@dataclasses.dataclass(frozen=True)
class LoadRow:
    """One load.

    Attributes:
      load: rate of arrival over the capacity.
      result: what it gave.
      ratio: tokens/s over those of the capacity, or over those that were offered where these are
        fewer.
    """

    load: float
    result: LoadResult
    ratio: float


def ratio(result: LoadResult, capacity: Capacity) -> float:
    """Tokens per second over what could be given: the capacity, or what was offered."""
    possible = min(capacity.tokens_per_second, result.offered_per_second)
    return result.tokens_per_second / possible if possible else math.nan


def measure_capacity(
    model: BenchModel, lengths: Lengths, *, options: BenchEngineOptions
) -> Capacity:
    """Times prefill and decoding alone, each after a warm-up.

    The steps are timed behind prompts of the mean length.

    Args:
      model: the model.
      lengths: of the requests.
      options: slots, repeats and seed.
    """
    rng = np.random.default_rng(options.seed)
    drawn = lengths.draw(rng, _SAMPLE)
    vocab_size = model.model.config.vocab_size
    prompts = [random_ids(rng, prompt, vocab_size) for prompt, _ in drawn]
    seconds: list[float] = []
    for _ in range(2):
        started = time.perf_counter()
        for prompt in prompts:
            state = model.prefill(prompt)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - started)
    chain = chain_of(is_small=options.small)
    slots = put_in_slots(model.empty_slots(options.slots), [state], options.slots)
    program = DecodeProgram(model.weights, slots, chain.length)
    mean_prompt = statistics.mean(prompt for prompt, _ in drawn)
    timing = time_steps(
        program, slots, position=round(mean_prompt), chain=chain, repeats=options.repeats
    )
    return Capacity(
        seconds[1] / _SAMPLE,
        timing.seconds,
        options.slots,
        mean_prompt,
        statistics.mean(answer for _, answer in drawn),
    )


def run(options: BenchEngineOptions) -> int:
    """Measures the capacity, then every load, and prints each at once; returns 0.

    Raises:
      ConfigError: a number is out of range.
    """
    _check(options)
    use_all_memory()
    config = bench_config(options.preset, options.dtype, is_small=options.small)
    if not isinstance(config, ModelConfig):
        raise ConfigError(f"{options.preset!r} is a Transformer; use a size of MEGALODON")
    model = BenchModel.make(config, options.weights, options.kv)
    lengths = Lengths(options.prompt, options.answer)
    capacity = measure_capacity(model, lengths, options=options)
    # Else the engine's warm-up could leave out programs that this has compiled, unnoticed.
    jax.clear_caches()
    kind = jax.devices()[0].device_kind
    print(f"{kind}, jax {jax.__version__}\n{_format_capacity(capacity)}", flush=True)
    arrivals = [
        draw_arrivals(
            np.random.default_rng([options.seed, number]),
            lengths,
            rate=load * capacity.requests_per_second,
            seconds=options.seconds,
            vocab_size=config.vocab_size,
        )
        for number, load in enumerate(options.load)
    ]
    engine = Engine(
        model.model,
        slots=options.slots,
        weights=options.weights,
        kv=options.kv,
        fixed_bucket=options.fixed_bucket,
        max_waiting=max(map(len, arrivals), default=0) + 1,
    )
    del model
    started = time.perf_counter()

    def report(count: int) -> None:
        print(f"program {count} compiled after {time.perf_counter() - started:.0f} s", flush=True)

    engine.warm_up((Features(),), report)
    print(f"compiled in {time.perf_counter() - started:.0f} s\n{_HEADER}", flush=True)
    rows: list[LoadRow] = []
    for load, requests in zip(options.load, arrivals, strict=True):
        result = run_load(engine, requests, seconds=options.seconds)
        rows.append(LoadRow(load, result, ratio(result, capacity)))
        print(_format(rows[-1]), flush=True)
        if options.json:
            Path(options.json).write_text(_as_json(kind, options, capacity, rows))
    return 0


def _as_json(
    kind: str, options: BenchEngineOptions, capacity: Capacity, rows: list[LoadRow]
) -> str:
    loads: list[dict[str, Any]] = []
    for row in rows:
        table = dataclasses.asdict(row)
        for name in ("first_token", "per_token", "between_reads"):
            table["result"][name] = getattr(row.result, name)._asdict()
        table["result"]["tokens_per_second"] = row.result.tokens_per_second
        loads.append(table)
    report = {
        "device": kind,
        "jax": jax.__version__,
        "options": dataclasses.asdict(options),
        "capacity": capacity._asdict() | {"tokens_per_second": capacity.tokens_per_second},
        "loads": loads,
    }
    return json.dumps(report, indent=1) + "\n"


def _check(options: BenchEngineOptions) -> None:
    for name in ("prompt", "answer"):
        low, high = getattr(options, name)
        if not 1 <= low <= high:
            raise ConfigError(f"--{name} is {low} {high}; use two numbers, 1 <= first <= second")
    if wrong := [load for load in options.load if not load > 0]:
        raise ConfigError(f"--load has {wrong[0]}; use numbers above 0")
    if options.slots < 2:
        raise ConfigError(f"--slots is {options.slots}; use at least 2")
    if not options.seconds > 0:
        raise ConfigError(f"--seconds is {options.seconds}; use a number above 0")
    if options.repeats < 1:
        raise ConfigError(f"--repeats is {options.repeats}; use at least 1")


def _format_capacity(capacity: Capacity) -> str:
    return (
        f"alone: {capacity.prefill_seconds * 1e3:.2f} ms a prompt of {capacity.prompt:,.0f} "
        f"tokens, {capacity.step_seconds * 1e3:.3f} ms a step of {capacity.slots} rows; "
        f"{capacity.requests_per_second:,.1f} requests/s, {capacity.tokens_per_second:,.0f} "
        f"tokens/s with answers of {capacity.answer:,.0f}"
    )


_HEADER = (
    f"{'load':>5} {'arrived':>8} {'finished':>9} {'tokens/s':>10} {'ratio':>6} "
    f"{'first token p50, p95':>22} {'a token p50, p95':>20} {'reads p50, p95':>18} "
    f"{'waiting, most':>14} {'running':>8} {'compiled':>9}"
)


def _format(row: LoadRow) -> str:
    result = row.result
    first, token, reads = (
        " ".join(f"{1e3 * value:8.2f}" for value in each)
        for each in (result.first_token, result.per_token, result.between_reads)
    )
    return (
        f"{row.load:5.2f} {result.arrived:8} {result.finished:9} "
        f"{result.tokens_per_second:10,.0f} {row.ratio:6.3f} {first:>19} ms {token:>17} ms "
        f"{reads:>15} ms {result.waiting:8.1f} {result.most_waiting:5} {result.running:8.1f} "
        f"{result.compilations:9}"
    )
