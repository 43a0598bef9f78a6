"""Programs compiled before the first request, several at a time."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from megalodon_jax.inference.blocks import (
    SlotState,
    decode_block,
    pack_start,
    start_row,
)
from megalodon_jax.inference.decoders import AnyDecodeWeights
from megalodon_jax.inference.known_prompt import KnownPrompt, start_known_row
from megalodon_jax.inference.prefill import PrefillState
from megalodon_jax.inference.sampling import Features, SamplingParams
from megalodon_jax.inference.scheduling import BLOCK_LENGTHS

OnCompiled = Callable[[int], None] | None
"""Called with the number of compiled programs so far, by any thread."""


class Program(NamedTuple):
    """One program of a jitted function.

    Attributes:
      function: the function.
      arguments: of a call; arrays are not donated by its compilation.
    """

    function: Any
    arguments: tuple[Any, ...]


class SlotProgram(NamedTuple):
    """A program that takes an engine's slots, and returns them alone or before other results.

    Attributes:
      function: a jitted function, to which the slots are donated.
      before: arguments before the slots.
      after: arguments after them.
    """

    function: Any
    before: tuple[Any, ...]
    after: tuple[Any, ...]

    def of(self, slots: SlotState) -> Program:
        """The program for these slots."""
        return Program(self.function, (*self.before, slots, *self.after))

    def run(self, slots: SlotState) -> SlotState:
        """Calls the function."""
        function, arguments = self.of(slots)
        result = function(*arguments)
        return result if isinstance(result, SlotState) else result[0]


def compile_programs(programs: Iterable[Program], on_compiled: OnCompiled = None) -> None:
    """Compiles programs so that calls with the same arguments find them.

    Functions are traced one after the other, in the caller's thread and with its settings. The
    compiler does not hold Python's lock: one thread for each CPU runs it. After an error or an
    interruption no further compilation starts.

    Args:
      programs: the programs.
      on_compiled: see `OnCompiled`.
    """
    numbers = itertools.count(1)

    def compile_one(lowered: Any) -> None:
        lowered.compile()
        if on_compiled is not None:
            on_compiled(next(numbers))

    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        compilations = [
            pool.submit(compile_one, function.lower(*arguments)) for function, arguments in programs
        ]
        for compilation in compilations:
            compilation.result()
    finally:
        pool.shutdown(cancel_futures=True)


def slot_programs(
    weights: AnyDecodeWeights,
    states: Sequence[PrefillState],
    known: KnownPrompt | None,
    buckets: Sequence[int],
    features: Sequence[Features],
) -> Iterator[SlotProgram]:
    """Programs that start rows and decode them.

    Args:
      weights: prepared weights.
      states: one of every batch size of prefill.
      known: a prompt of those that begin with a known prefix; None: there are none.
      buckets: numbers of rows that decode together.
      features: of the draws.
    """
    for each in features:
        options: dict[str, Any] = {"vocab_size": states[0].logits.shape[1], "seed": 0}
        start = pack_start(0, np.int32(0), SamplingParams(), each, **options)
        for state in states:
            yield SlotProgram(start_row, (), (state, start, each, None))
        if known is not None:
            start = pack_start(0, known.continuation, SamplingParams(), each, **options)
            yield SlotProgram(start_known_row, (), (weights, known.states, start, each, None))
        for rows in buckets:
            for length in BLOCK_LENGTHS:
                yield SlotProgram(decode_block, (weights,), (rows, length, each, None))
