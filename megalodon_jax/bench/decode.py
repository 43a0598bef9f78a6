r"""Speed of decoding: ms a step over the floor, first token, prefill, steps after long contexts.

    megalodon bench decode                                      # mega200M, 1 to 256 rows
    megalodon bench decode --batch 1 64 --weights model int8 --kv model int8 --profile
    megalodon bench decode --part context --against transformer \
        --json docs/results/decode_context.json                 # and Transformers beside it

The time of a step is (T(256) - T(32)) / 224, the median over ten pairs of chains of so many steps;
their blocks follow each other as in the engine, and draw greedily. The floor is the bytes that a
step must read and write (`decode_bytes.step_bytes`) over the rate of a large copy on the same
device in the same run. Models have random weights. JAX may use 95 % of a GPU's memory, unless
XLA_PYTHON_CLIENT_MEM_FRACTION is set.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from megalodon_jax.bench.ceilings import measure_ceilings
from megalodon_jax.bench.decode_memory import (
    ContextRow,
    grouped_queries,
    measure_context,
    memory_limit,
)
from megalodon_jax.bench.decode_steps import (
    BenchModel,
    Chain,
    DecodeProgram,
    DecodeRow,
    measure_steps,
    put_in_slots,
    random_ids,
)
from megalodon_jax.bench.options import BenchDecodeOptions, ModelPreset
from megalodon_jax.bench.prefill import FirstToken, PrefillSpeed, first_tokens, prefill_speed
from megalodon_jax.bench.train import TRANSFORMERS, small, use_all_memory
from megalodon_jax.config import (
    AnyEncoderConfig,
    LanguageModelConfig,
    ModelConfig,
    TrainConfig,
    TransformerConfig,
    model_preset,
)
from megalodon_jax.config.model import DType
from megalodon_jax.errors import ConfigError
from megalodon_jax.inference.prefill import PrefillState

# Different prompts of a batch; more rows share them.
_PROMPTS = 8


@dataclasses.dataclass
class DecodeReport:
    """Everything that a run measures, in the order of its file.

    Attributes:
      device: kind of the device.
      jax: version.
      preset: size of the model.
      bytes_per_second: rate of a large copy, read and written bytes.
      steps: of the batches, after the prompt and after longer contexts.
      first_tokens: times to the first token.
      prefill: speed by length.
      contexts: models beside each other, by context; see `bench.decode_memory`.
    """

    device: str
    jax: str
    preset: str
    bytes_per_second: float
    steps: list[DecodeRow] = dataclasses.field(default_factory=list)
    first_tokens: list[FirstToken] = dataclasses.field(default_factory=list)
    prefill: list[PrefillSpeed] = dataclasses.field(default_factory=list)
    contexts: list[ContextRow] = dataclasses.field(default_factory=list)

    def as_json(self) -> str:
        """The report with rates beside the times."""
        table = dataclasses.asdict(self)
        for row, written in zip(self.steps, table["steps"], strict=True):
            written["tokens_per_second"] = row.tokens_per_second
            written["times_floor"] = row.times_floor
        table["first_tokens"] = [
            each._asdict() | {"timeline": each.timeline and each.timeline._asdict()}
            for each in self.first_tokens
        ]
        table["prefill"] = [
            each._asdict() | {"tokens_per_second": each.tokens_per_second, "ratio": each.ratio}
            for each in self.prefill
        ]
        return json.dumps(table, indent=1) + "\n"


def run(options: BenchDecodeOptions) -> int:
    """Measures what is selected and prints every row at once; returns 0.

    Raises:
      ConfigError: options that do not go together.
    """
    _check(options)
    use_all_memory()
    device = jax.devices()[0].device_kind
    size: dict[str, int] = {"copied_bytes": 2**24, "matrix_size": 256} if options.small else {}
    rate = measure_ceilings(**size).bytes_per_second
    report = DecodeReport(device, jax.__version__, options.preset, rate)
    print(f"{device}, jax {jax.__version__}, copy {rate / 1e12:.2f} TB/s", flush=True)
    for line in _measure(options, report):
        print(line, flush=True)
        if options.json:
            Path(options.json).write_text(report.as_json())
    return 0


def _measure(options: BenchDecodeOptions, report: DecodeReport) -> Iterator[str]:
    """Fills the report; yields the lines of its tables."""
    config = bench_config(options.preset, options.dtype, is_small=options.small)
    for number, (weights, kv) in enumerate(itertools.product(options.weights, options.kv)):
        model = BenchModel.make(config, weights, kv)
        if batches := _batches(options):
            yield _STEP_HEADER
            for row in measure_batches(options, model, weights, batches, report.bytes_per_second):
                report.steps.append(row)
                yield from _format_step(row)
        if number == 0:
            yield from _measure_prompts(options, report, model)
        if number == 0 and options.against is not None:
            yield from _measure_against(options, report, model)
        # Weights of two formats need not fit together.
        del model


def _measure_prompts(
    options: BenchDecodeOptions, report: DecodeReport, model: BenchModel
) -> Iterator[str]:
    if "first_token" in options.part:
        for first in first_tokens(
            model, options.prompt, repeats=options.repeats, profile=options.profile
        ):
            report.first_tokens.append(first)
            known = f", {first.known:,} of them known" if first.known else ""
            yield f"first token {first.seconds * 1e3:.2f} ms, prompt of {first.prompt:,}{known}"
            if first.timeline is not None:
                yield str(first.timeline)
    if "prefill" in options.part:
        yield f"{'prefill':>10} {'ms':>10} {'tokens/s':>12} {'of model.hidden':>16}"
        for length in options.lengths:
            speed = prefill_speed(model, length, repeats=options.repeats)
            report.prefill.append(speed)
            ratio = f"({speed.reason})" if speed.ratio is None else f"{speed.ratio:.1%}"
            yield (
                f"{length:10,} {speed.seconds * 1e3:10.2f} {speed.tokens_per_second:12,.0f} "
                f"{ratio:>16}"
            )


def measure_batches(
    options: BenchDecodeOptions,
    model: BenchModel,
    weights: str,
    batches: list[int],
    bytes_per_second: float,
) -> Iterator[DecodeRow]:
    """Steps of every batch after the prompt, and after longer contexts where they are asked for.

    Args:
      options: the benchmark's.
      model: the model.
      weights: format of its weights.
      batches: rows that decode together.
      bytes_per_second: rate of a copy on this device.
    """
    rng = np.random.default_rng(0)
    vocab_size = model.model.config.vocab_size
    prompts = [random_ids(rng, options.prompt, vocab_size) for _ in range(_PROMPTS)]
    states = [model.prefill(prompt) for prompt in prompts[: max(batches)]]
    after: dict[int, PrefillState] = {}
    for batch in batches:
        contexts = options.contexts if _has_contexts(options, batch) else ()
        for context in contexts:
            if context not in after:
                ids = random_ids(rng, context + options.prompt, vocab_size)
                after[context] = model.prefill(ids)
        row = DecodeRow(options.preset, weights, batch, max(2, batch), options.prompt, kv=model.kv)
        try:
            yield from _measure_batch(
                options, model, row, states, contexts, after, bytes_per_second
            )
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            yield dataclasses.replace(row, reason=str(error).splitlines()[0])


def _measure_batch(
    options: BenchDecodeOptions,
    model: BenchModel,
    row: DecodeRow,
    states: list[PrefillState],
    contexts: tuple[int, ...],
    after: dict[int, PrefillState],
    bytes_per_second: float,
) -> Iterator[DecodeRow]:
    chain = chain_of(is_small=options.small)
    slots = put_in_slots(model.empty_slots(row.slots), states, row.batch)
    program = DecodeProgram(model.weights, slots, chain.length)
    measure: dict[str, Any] = {
        "chain": chain,
        "repeats": options.repeats,
        "bytes_per_second": bytes_per_second,
    }
    done, slots = measure_steps(row, program, slots, profile=options.profile, **measure)
    yield done
    for context in contexts:
        slots = put_in_slots(slots, [after[context]], row.batch)
        later = dataclasses.replace(row, position=context + options.prompt)
        done, slots = measure_steps(later, program, slots, **measure)
        yield done


def _measure_against(
    options: BenchDecodeOptions, report: DecodeReport, model: BenchModel
) -> Iterator[str]:
    """The model and Transformers of its size, by context."""
    full = bench_config(TRANSFORMERS[options.preset], options.dtype, is_small=options.small)
    assert isinstance(full, TransformerConfig)
    grouped = grouped_queries(full)
    name = TRANSFORMERS[options.preset]
    contenders: dict[str, LanguageModelConfig | None] = {
        options.preset: None,
        name: full,
        f"{name}, kv_heads {grouped.kv_heads}": grouped,
    }
    limit = memory_limit()
    yield _CONTEXT_HEADER
    for contender, config in contenders.items():
        contender_model = model if config is None else BenchModel.make(config)
        for batch in options.context_batch:
            for context in options.against_contexts:
                row = measure_context(
                    contender,
                    contender_model,
                    context=context,
                    batch=batch,
                    chain=chain_of(is_small=options.small),
                    repeats=options.repeats,
                    bytes_per_second=report.bytes_per_second,
                    limit=limit,
                )
                report.contexts.append(row)
                yield _format_context(row)


def bench_config(preset: ModelPreset, dtype: DType, *, is_small: bool) -> LanguageModelConfig:
    """The model of a benchmark of inference, written out as for training at full speed.

    Args:
      preset: its size.
      dtype: of products, keys and values.
      is_small: a model for a CPU.
    """
    config = model_preset(preset, dtype=dtype, scan_layers=False)
    config = small(TrainConfig(model=config)).model if is_small else config
    if isinstance(config, AnyEncoderConfig):
        raise ValueError(f"preset {preset!r} is an encoder, which does not decode")
    return config


def chain_of(*, is_small: bool) -> Chain:
    """32 and 256 steps, or 4 and 32 for a CPU."""
    return Chain(length=4) if is_small else Chain()


def _batches(options: BenchDecodeOptions) -> list[int]:
    batches = {batch for batch in options.batch if "step" in options.part}
    if "context" in options.part:
        batches |= set(options.context_batch)
    return sorted(batches)


def _has_contexts(options: BenchDecodeOptions, batch: int) -> bool:
    return "context" in options.part and batch in options.context_batch


def _check(options: BenchDecodeOptions) -> None:
    numbers = {
        "batch": options.batch,
        "context_batch": options.context_batch,
        "lengths": options.lengths,
        "contexts": options.contexts,
        "prompt": (options.prompt,),
        "repeats": (options.repeats,),
    }
    for name, values in numbers.items():
        if wrong := [value for value in values if value < 1]:
            raise ConfigError(f"--{name} has {wrong[0]}; use numbers of at least 1")
    config = bench_config(options.preset, options.dtype, is_small=options.small)
    if not isinstance(config, ModelConfig):
        raise ConfigError(
            f"{options.preset!r} is a Transformer; measure it with --against transformer beside "
            "the MEGALODON of its size"
        )
    if options.against is None:
        return
    if options.preset not in TRANSFORMERS:
        raise ConfigError(
            f"no Transformer has the size of {options.preset!r}; use one of "
            f"{', '.join(TRANSFORMERS)}"
        )
    chain = chain_of(is_small=options.small)
    steps = chain.length * chain.long
    if wrong := [context for context in options.against_contexts if context <= steps]:
        raise ConfigError(
            f"--against_contexts has {wrong[0]}; use more than the {steps} steps of a chain"
        )


_STEP_HEADER = (
    f"{'weights':8} {'kv':6} {'rows':>5} {'after':>10} {'ms a step':>10} {'floor':>8} {'times':>6} "
    f"{'kernels':>8} {'temporaries':>20} {'tokens/s a row, all':>20}"
)


def _format_step(row: DecodeRow) -> Iterator[str]:
    start = f"{row.weights:8} {row.kv:6} {row.batch:5} {row.position:10,} "
    if row.seconds is None or row.tokens_per_second is None or row.times_floor is None:
        yield f"{start}{row.reason}"
        return
    share = row.temporaries / row.cache_bytes
    yield (
        f"{start}{row.seconds * 1e3:10.3f} {row.floor_seconds * 1e3:8.3f} {row.times_floor:6.2f} "
        f"{row.kernels:8} {row.temporaries / 1e6:8.2f} MB ({share:6.2%}) "
        f"{1 / row.seconds:9,.0f} {row.tokens_per_second:10,.0f}"
    )
    for kind in row.kinds:
        yield f"  {kind.kind:16} {kind.seconds * 1e3:9.4f} ms {kind.launches:7.1f} launches a step"


_CONTEXT_HEADER = (
    f"{'model':32} {'rows':>5} {'context':>10} {'ms a step':>10} {'floor':>8} {'MB a row':>10} "
    f"{'rows that fit':>14}"
)


def _format_context(row: ContextRow) -> str:
    step = row.step
    if step.seconds is None:
        measured = f"{step.reason:>19}"
    else:
        measured = f"{step.seconds * 1e3:10.3f} {step.floor_seconds * 1e3:8.3f}"
    fitting = "-" if row.rows_that_fit is None else f"{row.rows_that_fit:,}"
    return (
        f"{step.model:32} {step.batch:5} {row.context:10,} {measured} {row.row_bytes / 1e6:10.1f} "
        f"{fitting:>14}"
    )
