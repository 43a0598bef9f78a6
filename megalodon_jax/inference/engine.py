"""Continuous batching: requests enter and leave the slots of one running batch."""

import collections
import dataclasses
import itertools
import os
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.cache import MAX_POSITION
from megalodon_jax.config import ModelConfig
from megalodon_jax.errors import EngineBusyError, RequestError, SessionError
from megalodon_jax.inference.blocks import (
    Emitted,
    RowRequest,
    SlotState,
    deactivate,
    decode_block,
    empty_slots,
    padded_stop_ids,
    start_row,
)
from megalodon_jax.inference.decoders import ModelWeights, cast_matrices, prepare_decoding
from megalodon_jax.inference.prefill import (
    Piece,
    PieceSizes,
    PrefillState,
    empty_prefill_state,
    prefill_piece,
)
from megalodon_jax.inference.prefix_cache import PrefixCache
from megalodon_jax.inference.requests import Request, Stream, TokenLogprobs
from megalodon_jax.inference.rows import extract_row, move_row
from megalodon_jax.inference.sampling import (
    Features,
    SamplingParams,
    empty_state,
    sampling_row,
)
from megalodon_jax.inference.scheduling import (
    BLOCK_LENGTHS,
    FEATURE_SETS,
    Buckets,
    FairQueue,
    block_length,
    covering,
)
from megalodon_jax.inference.sessions import Session, fingerprint
from megalodon_jax.inference.speculation import SpeculationSettings, Speculator
from megalodon_jax.inference.weights import WeightFormat
from megalodon_jax.language_model import LanguageModel

if TYPE_CHECKING:
    from megalodon_jax.data.tokenizer import Tokenizer


class _Prefill(NamedTuple):
    """A prompt on its way through the model, and the streams that wait for it."""

    streams: list[Stream]
    tokens: np.ndarray
    pieces: list[Piece]
    state: PrefillState


class _Pending(NamedTuple):
    """Tokens on the device, the stream of every column, and about how many tokens it gets."""

    emitted: Emitted
    streams: list[Stream | None]
    expected: int
    is_speculative: bool = False


class Engine:
    """Runs requests together in the slots of one batch.

    `step` does a bounded amount of work: one piece of a prompt, one block of decoding steps handed
    to the device, and the block before it read. Iterating over a stream calls it. An engine belongs
    to one thread.

    The tokens of a request are a function of its prompt, parameters and seed. In one bucket of rows
    they do not depend on the slot and the neighbours, bit for bit; programs of different buckets
    may round differently, unless `fixed_bucket` is set.

    Args:
      model: the model.
      slots: most requests that run at the same time, at least 2.
      tokenizer: for `Stream.text`, stop strings, and the ids that may be drawn.
      weights: "model" or "int8", see `inference.weights.prepare`.
      max_length: most tokens of a request, prompt and answer together; a model whose cache grows
        with the context needs it, and MEGALODON has no limit.
      max_waiting: most requests in the queue.
      prefix_cache_bytes: size of the cache of prompts' states at chunk borders; 0: none.
      fixed_bucket: always run all slots.
      speculation: prompt-lookup speculation, which changes no token; None: one token a step.
      seed: of requests that have no seed of their own.

    Raises:
      ValueError: a size is out of range, or the model does not have this format of weights.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        slots: int = 64,
        tokenizer: "Tokenizer | None" = None,
        weights: WeightFormat = "model",
        max_length: int | None = None,
        max_waiting: int = 1024,
        prefix_cache_bytes: int = 0,
        fixed_bucket: bool = False,
        speculation: SpeculationSettings | None = None,
        seed: int = 0,
    ):
        if slots < 2:
            raise ValueError(f"slots is {slots}; use at least 2")
        config = model.config
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.max_waiting = max_waiting
        self._vocab_size, self._num_outputs = config.vocab_size, config.num_outputs
        self._graphdef, params = nnx.split(model)
        self._params, self._weights = _prepared(self._graphdef, params, weights)
        self._pieces = PieceSizes.for_model(model)
        self._state = _empty_slots(self._graphdef, self._params, slots, max_length)
        self._buckets = Buckets((slots,)) if fixed_bucket else Buckets.up_to(slots)
        if isinstance(self._weights, ModelWeights):
            # A model's own call runs all rows of its cache.
            self._buckets = Buckets((slots,))
        self._speculator = None
        if speculation is not None:
            self._speculator = Speculator.of(speculation, self._weights, self._buckets, slots)
        self._streams: list[Stream | None] = [None] * slots
        self._waiting: FairQueue[list[Stream]] = FairQueue()
        self._prefill: _Prefill | None = None
        self._pending: collections.deque[_Pending] = collections.deque()
        self._seeds = itertools.count(seed)
        self._fingerprint = fingerprint(config, self._params)
        self._prefixes = None
        if prefix_cache_bytes:
            if not isinstance(config, ModelConfig):
                raise ValueError("prefix_cache_bytes is set; only MEGALODON has states at chunk borders")
            self._prefixes = PrefixCache(prefix_cache_bytes, config.chunk_size)

    # ---- Requests.

    def submit(self, request: Request) -> Stream:
        """Queues a request.

        Raises:
          RequestError: the request cannot be run; the message says why.
          EngineBusyError: the queue is full.
        """
        (stream,) = self.submit_samples(request, 1)
        return stream

    def submit_samples(self, request: Request, n: int) -> list[Stream]:
        """Queues n samples of one prompt, which share its prefill.

        Sample i draws with seed + i. Raises as `submit`.
        """
        if not 1 <= n <= len(self._streams):
            raise RequestError(f"n is {n}; use 1 to {len(self._streams)}, the engine's slots")
        if len(self._waiting) >= self.max_waiting:
            raise EngineBusyError(f"{self.max_waiting} requests are waiting; try again later")
        self._check(request)
        seed = request.params.seed
        seeds = [next(self._seeds) for _ in range(n)] if seed is None else range(seed, seed + n)
        streams = [Stream(request, each, self.step, self.tokenizer) for each in seeds]
        self._waiting.put(request.client, streams)
        return streams

    def cancel(self, stream: Stream) -> None:
        """Ends a stream; its tokens so far stay."""
        if not stream.is_finished:
            stream.finish("cancelled")
            self._free(stream)

    @property
    def is_idle(self) -> bool:
        """Whether no request is waiting or running."""
        return not (self._waiting or self._prefill or self._pending or any(self._streams))

    @property
    def num_running(self) -> int:
        """Requests in slots."""
        return sum(stream is not None for stream in self._streams)

    @property
    def acceptance(self) -> float:
        """Mean number of accepted drafts of a row in a step; 0 without speculation."""
        return 0.0 if self._speculator is None else self._speculator.acceptance

    @property
    def num_waiting(self) -> int:
        """Requests in the queue or in prefill."""
        return len(self._waiting) + (self._prefill is not None)

    def run(self) -> None:
        """Steps until no request is left."""
        while not self.is_idle:
            self.step()

    # ---- One step.

    def step(self) -> None:
        """One piece of a prompt, one block of decoding steps, and the block before it read."""
        self._advance_prefill()
        depth = len(self._pending)
        is_constrained = self._dispatch()
        # A constrained row needs its tokens before the next draw; else one block stays in flight.
        while len(self._pending) > (0 if is_constrained or len(self._pending) == depth else 1):
            self._read(self._pending.popleft())

    def _advance_prefill(self) -> None:
        if self._prefill is None and len(self._waiting) and None in self._streams:
            self._prefill = self._begin_prefill(self._waiting.get())
        job = self._prefill
        if job is None:
            return
        streams = [stream for stream in job.streams if not stream.is_finished]
        if not streams:
            self._prefill = None
            return
        if job.pieces:
            piece, *rest = job.pieces
            lengths = np.array([len(job.tokens)], np.int32)
            state = prefill_piece(
                self._graphdef, self._params, job.state, job.tokens[None], lengths, piece
            )
            job = _Prefill(streams, job.tokens, rest, state)
            if self._prefixes is not None and piece.count == piece.size:
                seen = job.tokens[: piece.start + piece.count]
                if streams[0].request.session is None:
                    self._prefixes.put(seen, state.cache)
        if not job.pieces:
            while streams and None in self._streams:
                self._start(streams.pop(0), job)
        self._prefill = job._replace(streams=streams) if streams else None

    def _begin_prefill(self, streams: list[Stream]) -> _Prefill:
        request = streams[0].request
        state = empty_prefill_state(self._graphdef, self._params, 1, self.max_length)
        tokens = np.asarray(request.prompt, np.int32)
        start = 0
        if request.session is not None:
            tokens = np.concatenate([np.asarray(request.session.pending, np.int32), tokens])
            state = state._replace(cache=request.session.restore(state.cache))
        elif self._prefixes is not None:
            start, cache = self._prefixes.get(tokens, state.cache)
            state = state._replace(cache=cache)
        return _Prefill(streams, tokens, list(self._pieces.split(len(tokens), start)), state)

    def _start(self, stream: Stream, job: _Prefill) -> None:
        slot = self._streams.index(None)
        params = stream.request.params
        row = sampling_row(
            dataclasses.replace(params, seed=stream.seed),
            vocab_size=self._num_outputs,
            num_tokens=self._num_tokens,
            prompt=job.tokens,
        )
        request = RowRequest(row, jnp.int32(params.max_tokens), padded_stop_ids(params.stop_ids))
        mask = self._masks([stream])
        self._state, emitted = start_row(
            self._state, slot, job.state, request, covering([stream.request.features]), mask
        )
        if stream.request.keep_session and params.stop:
            # A stop string is found on the host, after the slot has gone on: the session is then
            # the state after the prompt, and the answer's tokens wait in it.
            stream.session = Session.take(extract_row(job.state.cache, 0), (), self._fingerprint)
        self._streams[slot] = stream
        self._pending.append(_Pending(emitted, [stream], 1))
        if self._speculator is not None:
            self._speculator.start(slot, job.tokens, emitted)

    def _dispatch(self) -> bool:
        """Hands a block to the device; whether a row in it is constrained."""
        self._compact()
        running = [stream for stream in self._streams if stream is not None]
        if not running:
            return False
        is_constrained = any(stream.request.logits_mask is not None for stream in running)
        if is_constrained:
            while self._pending:
                self._read(self._pending.popleft())
            running = [stream for stream in self._streams if stream is not None]
            if not running:
                return True
        last = max(i for i, stream in enumerate(self._streams) if stream is not None)
        rows = self._buckets.of(last + 1)
        in_flight = sum(each.expected for each in self._pending)
        remaining = max(s.request.params.max_tokens - len(s.tokens) for s in running) - in_flight
        if remaining <= 0 and self._pending:
            return False
        streams = self._streams[:rows]
        features = covering(stream.request.features for stream in running)
        if not is_constrained and self._speculator is not None and self._speculator.runs(rows):
            self._state, emitted, expected = self._speculator.decode_block(
                self._weights, self._state, rows, remaining, features
            )
            self._pending.append(_Pending(emitted, list(streams), expected, is_speculative=True))
            return False
        length = block_length(
            remaining, is_waiting=self.num_waiting > 0, is_constrained=is_constrained
        )
        mask = self._masks(streams) if is_constrained else None
        self._state, emitted = decode_block(
            self._weights, self._state, rows, length, features, mask
        )
        self._pending.append(_Pending(emitted, list(streams), length))
        if self._speculator is not None:
            self._speculator.add(emitted)
        return is_constrained

    def _read(self, pending: _Pending) -> None:
        tokens, logprobs, valid = jax.device_get(pending.emitted)
        if self._speculator is not None and pending.is_speculative:
            self._speculator.count(tokens)
        for column, stream in enumerate(pending.streams):
            if stream is None:
                continue
            wanted = stream.request.params.logprobs
            for step, token in enumerate(tokens[:, column].tolist()):
                if stream.is_finished:
                    break
                if token < 0:
                    continue
                entry = None
                if wanted is not None:
                    entry = _token_logprobs(logprobs, (step, column), wanted)
                stream.add(token, entry, is_valid=bool(valid[step, column]))
            if stream.is_finished:
                self._free(stream)

    # ---- Slots.

    def _free(self, stream: Stream) -> None:
        """Takes a finished stream out of its slot, and keeps its state if the request says so."""
        if stream not in self._streams:
            return
        slot = self._streams.index(stream)
        self._streams[slot] = None
        request = stream.request
        if request.keep_session and not request.params.stop and stream.finish_reason != "cancelled":
            # The device stopped at the same token: the row's state has not changed since.
            row = extract_row((self._state.cache, self._state.token), slot)
            cache, token = row
            stream.session = Session.take(cache, (int(token[0]),), self._fingerprint)
        elif stream.session is not None:
            stream.session = stream.session.with_pending(stream.tokens)
        keep = np.ones(len(self._streams), bool)
        keep[slot] = False
        self._state = deactivate(self._state, keep)

    def _compact(self) -> None:
        """Moves the last row to the first free slot where a smaller bucket is then enough."""
        occupied = [i for i, stream in enumerate(self._streams) if stream is not None]
        if not occupied or self._buckets.of(len(occupied)) >= self._buckets.of(occupied[-1] + 1):
            return
        source, target = occupied[-1], self._streams.index(None)
        self._state = move_row(self._state, source, target)
        if self._speculator is not None:
            self._speculator.move(source, target)
        keep = np.ones(len(self._streams), bool)
        keep[source] = False
        self._state = deactivate(self._state, keep)
        self._streams[target], self._streams[source] = self._streams[source], None

    def _masks(self, streams: Sequence[Stream | None]) -> np.ndarray | None:
        masks = [
            None
            if stream is None or stream.request.logits_mask is None
            else stream.request.logits_mask(stream.tokens)
            for stream in streams
        ]
        if all(mask is None for mask in masks):
            return None
        words = -(-self._num_outputs // 32)
        allowed = np.full((len(streams), words), -1, np.int32)
        for row, mask in zip(allowed, masks, strict=True):
            if mask is not None:
                row[: len(mask)] = mask
        return allowed

    def _check(self, request: Request) -> None:
        prompt, params = np.asarray(request.prompt), request.params
        pending = () if request.session is None else request.session.pending
        if prompt.ndim != 1 or not (len(prompt) or pending):
            raise RequestError(
                f"the prompt has shape {prompt.shape}; pass at least one token id (an empty text "
                "begins with the tokenizer's bos_id)"
            )
        if len(prompt) and not np.issubdtype(prompt.dtype, np.integer):
            raise RequestError(f"the prompt is {prompt.dtype}; pass integer token ids")
        if len(prompt) and not 0 <= prompt.min() <= prompt.max() < self._vocab_size:
            raise RequestError(
                f"token ids run from {prompt.min()} to {prompt.max()}, but the model knows 0 to "
                f"{self._vocab_size - 1}"
            )
        if params.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer: pass Engine(..., tokenizer=)")
        seen = 0 if request.session is None else request.session.num_tokens
        total = seen + len(prompt) + params.max_tokens
        if self.max_length is not None and total > self.max_length:
            raise RequestError(
                f"{seen + len(prompt)} tokens and max_tokens {params.max_tokens} exceed the "
                f"engine's max_length {self.max_length}"
            )
        if total > MAX_POSITION:
            raise RequestError(f"{total} tokens exceed the largest position, {MAX_POSITION}")
        if request.session is not None and request.session.fingerprint != self._fingerprint:
            raise SessionError("the session belongs to another model or to other weights")
        try:
            padded_stop_ids(params.stop_ids)
            sampling_row(params, vocab_size=self._num_outputs, num_tokens=self._num_tokens, seed=0)
        except ValueError as error:
            raise RequestError(str(error)) from error

    @property
    def _num_tokens(self) -> int | None:
        return None if self.tokenizer is None else self.tokenizer.vocab_size

    # ---- Start-up and sessions.

    def warm_up(self, features: Sequence[Features] = FEATURE_SETS) -> None:
        """Compiles every program that requests with these features need.

        Afterwards nothing is compiled, whatever the requests, except those with a `logits_mask`.
        """
        if not self.is_idle:
            raise RequestError("warm_up needs an engine without requests")
        row = sampling_row(SamplingParams(), vocab_size=self._num_outputs, seed=0)
        request = RowRequest(row, jnp.int32(1), padded_stop_ids(()))
        for size in sorted({*self._pieces.whole, *self._pieces.padded}):
            for count in {size, size - 1} if size in self._pieces.padded else {size}:
                is_known = count == size and size not in self._pieces.whole
                if is_known:
                    continue
                state = empty_prefill_state(self._graphdef, self._params, 1, self.max_length)
                state = prefill_piece(
                    self._graphdef,
                    self._params,
                    state,
                    np.zeros((1, count), np.int32),
                    np.array([count], np.int32),
                    Piece(0, count, size),
                )
        for each in features:
            self._state, _ = start_row(self._state, 0, state, request, each, None)
            for rows in self._buckets.sizes:
                for length in BLOCK_LENGTHS:
                    self._state, _ = decode_block(
                        self._weights, self._state, rows, length, each, None
                    )
        if self._speculator is not None:
            self._state = self._speculator.warm_up(
                self._weights, self._state, self._buckets.sizes, features
            )
        self._state = move_row(self._state, 0, 0)
        self._state = deactivate(self._state, np.zeros(len(self._streams), bool))
        extract_row((self._state.cache, self._state.token), 0)
        extract_row(state.cache, 0)
        if self._prefixes is not None:
            self._prefixes.warm_up(state.cache)
        jax.block_until_ready(self._state)

    def load_session(self, path: str | os.PathLike[str]) -> Session:
        """Reads a session that `Session.save` wrote.

        Raises:
          SessionError: the file is damaged, or the session belongs to another model.
        """
        state = empty_prefill_state(self._graphdef, self._params, 1, self.max_length)
        return Session.load(path, state.cache, self._fingerprint)


@partial(jax.jit, static_argnums=(0, 2))
def _prepared(
    graphdef: nnx.GraphDef, params: nnx.State, weights: WeightFormat
) -> tuple[nnx.State, Any]:
    model = nnx.merge(graphdef, params)
    return nnx.state(cast_matrices(model)), prepare_decoding(model, weights)


@partial(jax.jit, static_argnums=(0, 2, 3))
def _empty_slots(
    graphdef: nnx.GraphDef, params: nnx.State, slots: int, max_length: int | None
) -> SlotState:
    model: LanguageModel = nnx.merge(graphdef, params)
    sampling = empty_state(slots, vocab_size=model.config.num_outputs)
    return empty_slots(model.init_cache(slots, max_length=max_length), sampling)


def _token_logprobs(logprobs: Any, index: tuple[int, int], count: int) -> TokenLogprobs:
    ids, top = logprobs.top_ids[index][:count], logprobs.top[index][:count]
    return TokenLogprobs(
        float(logprobs.token[index]), tuple(zip(ids.tolist(), top.tolist(), strict=True))
    )
