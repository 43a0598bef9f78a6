"""Prompts on their way through the model: rows of one batch, piece by piece."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from megalodon_jax.config import KvFormat
from megalodon_jax.inference.prefill import (
    Piece,
    PieceSizes,
    PrefillState,
    empty_prefill_state,
    piece_call,
    prefill_piece,
    score_piece,
)
from megalodon_jax.inference.prefix_cache import PrefixCache, reads_prefixes
from megalodon_jax.inference.requests import Stream, TokenLogprobs
from megalodon_jax.inference.rows import extract_row, replace_row
from megalodon_jax.inference.sampling import Logprobs
from megalodon_jax.inference.scheduling import FairQueue
from megalodon_jax.inference.warm_up import Program


@dataclasses.dataclass
class PromptRow:
    """A prompt, and the streams that wait for it.

    Attributes:
      streams: samples that begin after the prompt.
      tokens: all of the prompt's tokens, those that wait in its session first.
    """

    streams: list[Stream]
    tokens: np.ndarray

    @classmethod
    def of(cls, streams: list[Stream]) -> "PromptRow":
        """The row of some samples of one request."""
        request = streams[0].request
        tokens = request.tokens
        if request.session is not None:
            tokens = np.concatenate([np.asarray(request.session.pending, np.int32), tokens])
        return cls(streams, tokens)

    @property
    def waiting(self) -> list[Stream]:
        """Streams that have not been cancelled."""
        return [stream for stream in self.streams if not stream.is_finished]


@dataclasses.dataclass
class Prefiller:
    """Runs prompts through a model.

    Attributes:
      graphdef: of the model.
      params: of the model, matrices cast.
      sizes: of the pieces.
      max_length: for caches that grow.
      prefixes: states of prompts' beginnings; None: not kept.
      kv: format of keys and values.
    """

    graphdef: nnx.GraphDef
    params: nnx.State
    sizes: PieceSizes
    max_length: int | None
    prefixes: PrefixCache | None
    kv: KvFormat = "model"
    _spare: PrefillState | None = None

    def empty_state(self, rows: int) -> PrefillState:
        """The state of rows before their first token."""
        return empty_prefill_state(self.graphdef, self.params, rows, self.max_length, self.kv)

    def prepare(self) -> None:
        """Makes the empty state of the next prompt, which otherwise runs before its first piece."""
        if self._spare is None:
            self._spare = self.empty_state(1)

    def _take_empty(self, rows: int) -> PrefillState:
        if rows > 1 or self._spare is None:
            return self.empty_state(rows)
        state, self._spare = self._spare, None
        return state

    def next_job(
        self, waiting: FairQueue[list[Stream]], most: int, batch_sizes: tuple[int, int]
    ) -> "PrefillJob":
        """Takes prompts whose pieces have the same sizes out of the queue.

        Args:
          waiting: the queue, not empty.
          most: prompts of the job, at least 1.
          batch_sizes: rows of the batch of one prompt, and of several.
        """
        rows = [PromptRow.of(waiting.get())]
        plan = self.plan(rows[0])
        while len(rows) < most and len(waiting):
            row = PromptRow.of(waiting.peek())
            if self.plan(row) != plan:
                break
            waiting.get()
            rows.append(row)
        return self.begin(rows, batch_sizes[len(rows) > 1])

    def begin(self, rows: Sequence[PromptRow], batch_size: int) -> "PrefillJob":
        """A job of up to `batch_size` prompts, whose pieces have the same sizes."""
        state = self._take_empty(batch_size)
        starts = []
        for index, row in enumerate(rows):
            start, cache = 0, None
            empty = state.cache if batch_size == 1 else extract_row(state.cache, index)
            session = row.streams[0].request.session
            if session is not None:
                cache = session.restore(empty)
            elif self._uses_prefixes(row):
                assert self.prefixes is not None
                start, cache = self.prefixes.get(row.tokens, empty)
            if cache is not None and batch_size == 1:
                state = state._replace(cache=cache)
            elif cache is not None:
                state = state._replace(cache=replace_row(state.cache, index, cache))
            starts.append(start)
        tokens = [row.tokens[start:] for row, start in zip(rows, starts, strict=True)]
        lengths = np.array([len(each) for each in tokens], np.int32)
        padded = np.zeros((batch_size, lengths.max()), np.int32)
        for target, each in zip(padded, tokens, strict=False):
            target[: len(each)] = each
        lengths = np.pad(lengths, (0, batch_size - len(lengths)))
        pieces = list(self.sizes.split(padded.shape[1]))
        return PrefillJob(self, list(rows), starts, padded, lengths, pieces, state)

    def plan(self, row: PromptRow) -> tuple[int, ...]:
        """Sizes of the prompt's pieces: prompts with the same sizes run together."""
        start = 0
        if self._uses_prefixes(row):
            assert self.prefixes is not None
            start = self.prefixes.longest(row.tokens)
        return tuple(piece.size for piece in self.sizes.split(len(row.tokens) - start))

    def _uses_prefixes(self, row: PromptRow) -> bool:
        return self.prefixes is not None and reads_prefixes(row.streams[0].request)

    def programs(self, batch_size: int) -> Iterator[Program]:
        """The programs of a batch size."""
        for piece in self._example_pieces(batch_size):
            yield Program(*piece_call(*self._example(batch_size, piece)))

    def warm_up(self, batch_size: int) -> None:
        """Runs the programs of a batch size, and those that take and put rows."""
        for piece in self._example_pieces(batch_size):
            state = prefill_piece(*self._example(batch_size, piece))
        row = extract_row(state.cache, 0)
        if batch_size > 1:
            replace_row(state.cache, 0, row)
        if self.prefixes is not None:
            self.prefixes.warm_up(row)

    def _example_pieces(self, batch_size: int) -> list[Piece]:
        pieces = [Piece(0, size, size, is_whole=True) for size in self.sizes.whole]
        pieces += [Piece(0, size, size, is_whole=False) for size in self.sizes.padded]
        if batch_size > 1:
            # Rows that end before a piece does.
            longer = set(self.sizes.whole) - set(self.sizes.padded)
            pieces += [Piece(0, size, size, is_whole=False) for size in longer]
        return pieces

    def _example(self, batch_size: int, piece: Piece) -> tuple[Any, ...]:
        """Arguments of `prefill_piece`."""
        tokens = np.zeros((batch_size, piece.size), np.int32)
        lengths = np.full(batch_size, piece.size, np.int32)
        return self.graphdef, self.params, self.empty_state(batch_size), tokens, lengths, piece


@dataclasses.dataclass
class PrefillJob:
    """Some prompts in one batch.

    Attributes:
      prefiller: runs it.
      rows: the prompts; rows of the batch after them are empty.
      starts: tokens of each prompt whose state was known.
      tokens: the others, (batch size, longest).
      lengths: their numbers.
      pieces: left to run.
      state: after the pieces so far.
      logprobs: of the tokens that follow those of each piece, if a request wants them.
    """

    prefiller: Prefiller
    rows: list[PromptRow]
    starts: list[int]
    tokens: np.ndarray
    lengths: np.ndarray
    pieces: list[Piece]
    state: PrefillState
    logprobs: list[Logprobs] = dataclasses.field(default_factory=list)

    def advance(self) -> None:
        """Runs the next piece."""
        piece = self.pieces.pop(0)
        runner = self.prefiller
        operands = self.state, self.tokens, self.lengths, piece
        if any(row.streams[0].request.prompt_logprobs is not None for row in self.rows):
            self.state, logprobs = score_piece(runner.graphdef, runner.params, *operands)
            self.logprobs.append(logprobs)
        else:
            self.state = prefill_piece(runner.graphdef, runner.params, *operands)
        if runner.prefixes is None:
            return
        end = piece.start + piece.count
        for index, (row, start) in enumerate(zip(self.rows, self.starts, strict=True)):
            has_all = self.lengths[index] >= end
            if has_all and row.streams[0].request.session is None:
                runner.prefixes.put(row.tokens[: start + end], self.state.cache, index)

    def prompt_logprobs(self, index: int, count: int) -> list[TokenLogprobs | None]:
        """Those of a row's tokens, with the `count` most probable ones; None for the first."""
        pieces = jax.device_get(self.logprobs)
        joined = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1)[index], *pieces)
        length = self.lengths[index]
        return [None, *(TokenLogprobs.take(joined, (i,), count) for i in range(length - 1))]

    @property
    def num_tokens_left(self) -> int:
        """Tokens of the longest prompt that have not been through the model."""
        return sum(piece.count for piece in self.pieces)

    def block_until_ready(self) -> None:
        """Waits for the device, for progress messages of long prompts."""
        jax.block_until_ready(self.state.logits)
