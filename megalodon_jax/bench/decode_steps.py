"""Slots that decode without an engine, and the time of their steps.

Blocks of steps are chained as `Engine.step` chains them: a block is handed to the device before the
tokens of the one before it are read. The time of a step is that of the steps between a short and a
long chain, so that the first launch and the last copy to the host do not count.
"""

import dataclasses
import statistics
import time
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.bench.decode_bytes import cache_slots, mean_fill, num_bytes, step_bytes
from megalodon_jax.bench.kernel_times import KernelTimes, kernel_times
from megalodon_jax.compiled.hlo import parse_program
from megalodon_jax.compiled.launches import count_launches
from megalodon_jax.compiled.memory import read_memory
from megalodon_jax.config import KvFormat, LanguageModelConfig, WeightFormat
from megalodon_jax.inference.blocks import (
    Emitted,
    SlotState,
    decode_block,
    empty_slots,
    pack_start,
    start_row,
)
from megalodon_jax.inference.decoders import AnyDecodeWeights, cast_matrices, prepare_decoding
from megalodon_jax.inference.graph import HashedGraphDef
from megalodon_jax.inference.prefill import (
    PieceSizes,
    PrefillState,
    empty_prefill_state,
    prefill_piece,
)
from megalodon_jax.inference.sampling import Features, SamplingParams, empty_state
from megalodon_jax.language_model import LanguageModel
from megalodon_jax.models import build_model
from megalodon_jax.typing import Array, Int32

# A row never ends on its own.
_NO_LIMIT = 2**30
GREEDY = SamplingParams(temperature=0.0)
_ENDLESS = SamplingParams(temperature=0.0, max_tokens=_NO_LIMIT)


class Chain(NamedTuple):
    """Two numbers of blocks whose times are subtracted; 32 and 256 steps.

    Attributes:
      length: steps of a block.
      short: blocks of the short chain.
      long: blocks of the long chain.
    """

    length: int = 32
    short: int = 1
    long: int = 8

    @property
    def first(self) -> int:
        """Steps before those that are timed."""
        return self.length * self.short

    @property
    def steps(self) -> int:
        """Steps that are timed."""
        return self.length * (self.long - self.short)


@dataclasses.dataclass(frozen=True)
class BenchModel:
    """A model with random weights, and its weights prepared for decoding.

    Attributes:
      graphdef: of the model.
      params: with cast matrices, for prefill.
      weights: for decoding.
      kv: format of keys and values.
    """

    graphdef: nnx.GraphDef
    params: nnx.State
    weights: AnyDecodeWeights
    kv: KvFormat = "model"

    @classmethod
    def make(
        cls,
        config: LanguageModelConfig,
        weights: WeightFormat = "model",
        kv: KvFormat = "model",
    ) -> "BenchModel":
        """Fresh weights.

        Raises:
          ValueError: the model does not have this format of weights.
        """
        model = random_model(config)

        @partial(jax.jit, static_argnums=0)
        def prepared(graphdef: nnx.GraphDef, params: nnx.State) -> tuple[nnx.State, Any]:
            model: LanguageModel = nnx.merge(graphdef, params)
            return nnx.state(cast_matrices(model)), prepare_decoding(model, weights)

        structure, params = nnx.split(model)
        graphdef = HashedGraphDef.of(structure)
        return cls(graphdef, *prepared(graphdef, params), kv=kv)

    @property
    def model(self) -> LanguageModel:
        """The model."""
        return nnx.merge(self.graphdef, self.params)

    def prefill(self, prompt: np.ndarray, max_length: int | None = None) -> PrefillState:
        """The state of one row after a prompt, as the engine computes it.

        Args:
          prompt: token ids (n,).
          max_length: most tokens of a cache that grows with the context.
        """
        state = empty_prefill_state(self.graphdef, self.params, 1, max_length, self.kv)
        return self.prefill_from(state, prompt)

    def prefill_from(self, state: PrefillState, prompt: np.ndarray) -> PrefillState:
        """The same, from an empty state, which is donated."""
        lengths = np.array([len(prompt)], np.int32)
        for piece in PieceSizes.for_model(self.model).split(len(prompt)):
            state = prefill_piece(self.graphdef, self.params, state, prompt[None], lengths, piece)
        return state

    def empty_slots(self, slots: int, max_length: int | None = None) -> SlotState:
        """Slots without requests."""

        @jax.jit
        def make(params: nnx.State) -> SlotState:
            model: LanguageModel = nnx.merge(self.graphdef, params)
            sampling = empty_state(slots, vocab_size=model.config.num_outputs)
            cache = model.init_cache(slots, max_length=max_length, kv=self.kv)
            return empty_slots(cache, sampling)

        return make(self.params)


def random_model(config: LanguageModelConfig) -> LanguageModel:
    """A model with fresh weights, made by one program."""
    graphdef = nnx.split(nnx.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0))))[0]
    params = jax.jit(lambda: nnx.split(build_model(config, rngs=nnx.Rngs(0)))[1])()
    return nnx.merge(graphdef, params)


def random_ids(rng: np.random.Generator, count: int, vocab_size: int) -> np.ndarray:
    """Token ids of a prompt, int32 (count,)."""
    return rng.integers(0, vocab_size, count, dtype=np.int32)


def put_in_slots(slots: SlotState, states: list[PrefillState], rows: int) -> SlotState:
    """Starts greedy requests that never end in the first rows; states are used in turn."""
    vocab_size = states[0].logits.shape[1]
    for slot in range(rows):
        state = states[slot % len(states)]
        start = pack_start(slot, np.int32(0), _ENDLESS, Features(), vocab_size=vocab_size)
        slots, _ = start_row(slots, state, start, Features(), None)
    return slots


class DecodeProgram:
    """A compiled block of greedy steps over all slots.

    Args:
      weights: prepared weights.
      slots: slots of these shapes; not used otherwise.
      length: steps of a block.
    """

    def __init__(self, weights: AnyDecodeWeights, slots: SlotState, length: int):
        self.weights, self.length = weights, length
        rows = slots.token.shape[0]
        started = time.perf_counter()
        lowered: Any = decode_block.lower(weights, slots, rows, length, Features())
        self.compiled: jax.stages.Compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - started

    def __call__(self, slots: SlotState) -> tuple[SlotState, Emitted]:
        """Runs a block; the slots are donated."""
        return self.compiled(self.weights, slots)

    @property
    def kernels_per_step(self) -> int:
        """Kernels and copies that a step launches, see `count_launches`."""
        text = self.compiled.as_text()
        assert text is not None
        return count_launches(parse_program(text), iterations=self.length)

    @property
    def temporaries(self) -> int:
        """Bytes of temporaries by the compiler's report."""
        memory = read_memory(self.compiled)
        assert memory is not None
        return memory.temporaries


class StepTiming(NamedTuple):
    """Seconds of a step, and the slots, which were donated."""

    seconds: float
    slots: SlotState


def time_steps(
    program: DecodeProgram, slots: SlotState, *, position: int, chain: Chain, repeats: int
) -> StepTiming:
    """Seconds of a step, median over pairs of a short and a long chain.

    Args:
      program: the block.
      slots: rows that decode are active; donated.
      position: tokens that each row has had before the first step of every chain. Its slots must
        hold numbers: they are read, whatever they are.
      chain: the chains.
      repeats: pairs, after one for warm-up.
    """
    short, long = [], []
    for _ in range(repeats + 1):
        for blocks, seconds in ((chain.short, short), (chain.long, long)):
            slots = jax.block_until_ready(_rewind(slots, jnp.int32(position)))
            spent, slots = _run_chain(program, slots, blocks)
            seconds.append(spent)
    return StepTiming(seconds_per_step(short[1:], long[1:], chain.steps), slots)


def seconds_per_step(short: list[float], long: list[float], steps: int) -> float:
    """The median of (long - short) / steps over pairs of chains."""
    return statistics.median((b - a) / steps for a, b in zip(short, long, strict=True))


def _run_chain(program: DecodeProgram, slots: SlotState, blocks: int) -> tuple[float, SlotState]:
    started = time.perf_counter()
    previous = None
    for _ in range(blocks):
        slots, emitted = program(slots)
        if previous is not None:
            jax.device_get(previous)
        previous = emitted
    jax.device_get(previous)
    return time.perf_counter() - started, slots


@partial(jax.jit, donate_argnums=0)
def _rewind(slots: SlotState, position: Int32[Array, ""]) -> SlotState:
    """Active rows go back to a position; their states and slots keep what they hold."""
    cache = slots.cache
    positions = jnp.where(slots.active, position, cache.position)
    return slots._replace(
        cache=dataclasses.replace(cache, position=positions),
        remaining=jnp.full_like(slots.remaining, _NO_LIMIT),
    )


@dataclasses.dataclass(frozen=True)
class DecodeRow:
    """Measured steps of one batch.

    Attributes:
      model: name of the model.
      weights: format of the weights.
      batch: rows that decode.
      slots: rows that run; one more than `batch` if that is 1.
      position: tokens before the first step.
      fill: filled slots of a row, mean over the timed steps.
      seconds: of a step; None if it did not fit.
      bytes: that a step must read and write, see `step_bytes`.
      floor_seconds: bytes over the rate of a copy on this device.
      kernels: that a step launches.
      temporaries: bytes.
      cache_bytes: of all slots.
      compile_seconds: of the block.
      kinds: with a profile, GPU time of a step by kind of kernel.
      reason: why there are no numbers.
      kv: format of keys and values.
    """

    model: str
    weights: str
    batch: int
    slots: int
    position: int
    fill: float = 0.0
    seconds: float | None = None
    bytes: int = 0
    floor_seconds: float = 0.0
    kernels: int = 0
    temporaries: int = 0
    cache_bytes: int = 0
    compile_seconds: float = 0.0
    kinds: tuple[KernelTimes, ...] = ()
    reason: str | None = None
    kv: str = "model"

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of all rows."""
        return None if self.seconds is None else self.batch / self.seconds

    @property
    def times_floor(self) -> float | None:
        """The time over the floor."""
        return None if self.seconds is None else self.seconds / self.floor_seconds


def measure_steps(
    row: DecodeRow,
    program: DecodeProgram,
    slots: SlotState,
    *,
    chain: Chain,
    repeats: int,
    bytes_per_second: float,
    profile: bool = False,
) -> tuple[DecodeRow, SlotState]:
    """The row with numbers, and the slots, which were donated.

    Args:
      row: the row.
      program: block over these slots.
      slots: the first `row.batch` rows are active.
      chain: the timed chains.
      repeats: pairs of chains.
      bytes_per_second: rate of a copy on this device.
      profile: also measure the GPU time by kind of kernel, after the others.
    """
    fill = mean_fill(row.position + chain.first, chain.steps, cache_slots(slots.cache))
    needed = step_bytes(program.weights, slots.cache, rows=row.batch, fill=fill).total
    cache_bytes = num_bytes(slots.cache)
    seconds, slots = time_steps(program, slots, position=row.position, chain=chain, repeats=repeats)
    kinds: tuple[KernelTimes, ...] = ()
    if profile:
        slots = _rewind(slots, jnp.int32(row.position))
        kinds, slots = _profile(program, slots)
    done = dataclasses.replace(
        row,
        fill=fill,
        seconds=seconds,
        bytes=needed,
        floor_seconds=needed / bytes_per_second,
        kernels=program.kernels_per_step,
        temporaries=program.temporaries,
        cache_bytes=cache_bytes,
        compile_seconds=program.compile_seconds,
        kinds=kinds,
    )
    return done, slots


def _profile(program: DecodeProgram, slots: SlotState) -> tuple[tuple[KernelTimes, ...], SlotState]:
    newest = [slots]

    def call() -> SlotState:
        newest[0] = program(newest[0])[0]
        return newest[0]

    kinds = tuple(
        KernelTimes(kind, seconds / program.length, launches / program.length)
        for kind, seconds, launches in kernel_times(call)
    )
    return kinds, newest[0]
