"""Continuous batching: requests enter and leave the slots of one running batch."""

import collections
import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from megalodon_jax.config import KvFormat, ModelConfig, WeightFormat
from megalodon_jax.errors import EngineBusyError, RequestError
from megalodon_jax.inference.blocks import (
    Emitted,
    deactivate,
    decode_block,
    move_slot,
    pack_start,
    start_row,
)
from megalodon_jax.inference.decoders import ModelWeights
from megalodon_jax.inference.engine_state import check_mesh, make_slots, prepare_weights
from megalodon_jax.inference.graph import HashedGraphDef
from megalodon_jax.inference.known_prompt import KnownPrompts, start_known_row
from megalodon_jax.inference.prefill import PieceSizes
from megalodon_jax.inference.prefill_job import Prefiller, PrefillJob
from megalodon_jax.inference.prefix_cache import PrefixCache
from megalodon_jax.inference.request_limits import RequestLimits
from megalodon_jax.inference.requests import Request, Stream, TokenLogprobs, logits_masks
from megalodon_jax.inference.rows import extract_row
from megalodon_jax.inference.sampling import Features
from megalodon_jax.inference.scheduling import (
    FEATURE_SETS,
    Buckets,
    FairQueue,
    block_length,
    covering,
)
from megalodon_jax.inference.sessions import Session, fingerprint
from megalodon_jax.inference.speculation import SpeculationSettings, Speculator
from megalodon_jax.inference.warm_up import OnCompiled, compile_programs, slot_programs
from megalodon_jax.language_model import LanguageModel
from megalodon_jax.parallel.sharding import shardings_of

if TYPE_CHECKING:
    from megalodon_jax.data.tokenizer import Tokenizer


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
      kv: keys and values in the model's dtype ("model"), or as 8-bit integers, half of bfloat16's
        bytes ("int8"): drawn tokens are then those of the rounded keys and values. A prompt's
        tokens see each other's exact ones, unless they continue a session inside a chunk.
      max_length: most tokens of a request, prompt and answer together; a model whose cache grows
        with the context needs it, and MEGALODON has no limit.
      max_waiting: most requests in the queue.
      prefill_rows: most prompts that go through the model together; they have pieces of the same
        sizes. More rows serve many short prompts faster.
      prefix_cache_bytes: size of the cache of prompts' states at chunk borders; 0: none.
      fixed_bucket: always run all slots.
      fill_slots_first: no decoding while a prompt waits and a slot is free: more tokens a second
        in all, later first tokens.
      short_blocks: at most 8 decoding steps at a time, so that tokens come steadily.
      num_tokens: draw only ids below this; None: all that the tokenizer has.
      speculation: prompt-lookup speculation, which changes no token; None: one token a step.
      seed: of requests that have no seed of their own.
      mesh: devices that run together: rows over `replica` and `data`, features over `model`; None:
        the default device.

    Raises:
      ValueError: a size is out of range or does not divide over the mesh, or the model does not
        have this format of weights, or of keys and values.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        slots: int = 64,
        tokenizer: "Tokenizer | None" = None,
        weights: WeightFormat = "model",
        kv: KvFormat = "model",
        max_length: int | None = None,
        max_waiting: int = 1024,
        prefill_rows: int = 1,
        prefix_cache_bytes: int = 0,
        fixed_bucket: bool = False,
        fill_slots_first: bool = False,
        short_blocks: bool = False,
        num_tokens: int | None = None,
        speculation: SpeculationSettings | None = None,
        seed: int = 0,
        mesh: Mesh | None = None,
    ):
        if slots < 2:
            raise ValueError(f"slots is {slots}; use at least 2")
        if not 1 <= prefill_rows <= slots:
            raise ValueError(f"prefill_rows is {prefill_rows}; use 1 to {slots}, the slots")
        config = model.config
        row_shards = check_mesh(mesh, config, slots, prefill_rows)
        self._mesh = mesh
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.max_waiting = max_waiting
        self._config = config
        self._num_outputs = config.num_outputs
        if num_tokens is None and tokenizer is not None:
            num_tokens = tokenizer.vocab_size
        self._num_tokens = num_tokens
        self._limits = RequestLimits(
            config.vocab_size, self._num_outputs, num_tokens, max_length, tokenizer is not None
        )
        self._fill_slots_first, self._short_blocks = fill_slots_first, short_blocks
        structure, params = nnx.split(model)
        graphdef = HashedGraphDef.of(structure)
        if mesh is not None:
            params = jax.device_put(params, shardings_of(params, mesh))
        with self._devices():
            params, self._weights = prepare_weights(graphdef, params, weights)
            self._state = make_slots(graphdef, params, slots, max_length, kv)
        prefixes = None
        if prefix_cache_bytes:
            if not isinstance(config, ModelConfig):
                raise ValueError("prefix_cache_bytes: only MEGALODON has states at chunk borders")
            prefixes = PrefixCache(prefix_cache_bytes, config.chunk_size)
        sizes = PieceSizes.for_model(model)
        self._prefiller = Prefiller(graphdef, params, sizes, max_length, prefixes, kv)
        self._known_prompts = KnownPrompts.of(
            prefixes, self._weights, (weights, kv), is_sharded=mesh is not None
        )
        # Prompts alone run in a batch of one, unless the batch is sharded.
        self._prefill_rows, self._fewest_rows = prefill_rows, 1 if row_shards == 1 else prefill_rows
        # A model's own call runs all rows of its cache, and so does a sharded batch.
        runs_all = fixed_bucket or isinstance(self._weights, ModelWeights) or row_shards > 1
        self._buckets = Buckets((slots,)) if runs_all else Buckets.up_to(slots)
        self._speculator = None
        if speculation is not None:
            if mesh is not None:
                raise ValueError(
                    "speculation runs on one device; pass speculation=None or mesh=None"
                )
            self._speculator = Speculator.of(speculation, self._weights, self._buckets, slots)
        self._streams: list[Stream | None] = [None] * slots
        self._waiting: FairQueue[list[Stream]] = FairQueue()
        self._job: PrefillJob | None = None
        self._pending: collections.deque[_Pending] = collections.deque()
        self._seeds = itertools.count(seed)

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
        self._limits.check(request)
        if request.session is not None:
            request.session.check(self._fingerprint, self._prefiller.kv)
        seed = request.params.seed
        seeds = [next(self._seeds) for _ in range(n)] if seed is None else range(seed, seed + n)
        streams = [Stream(request, each, self.step, self.tokenizer) for each in seeds]
        self._waiting.put(request.client, list(streams))
        return streams

    def cancel(self, stream: Stream) -> None:
        """Ends a stream; its tokens so far stay."""
        if not stream.is_finished:
            stream.finish("cancelled")
            self._waiting.drop(lambda samples: all(each.is_finished for each in samples))
            with self._devices():
                self._free(stream)

    @property
    def is_idle(self) -> bool:
        """Whether no request is waiting or running."""
        return not (self._waiting or self._job or self._pending or any(self._streams))

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
        return len(self._waiting) + (0 if self._job is None else len(self._job.rows))

    @property
    def prefill_progress(self) -> tuple[int, int] | None:
        """Tokens of the prompt in prefill that have been through the model, and all of them.

        It waits for the piece that the device works on. None: no prompt is in prefill.
        """
        job = self._job
        if job is None:
            return None
        job.block_until_ready()
        total = job.tokens.shape[1]
        return total - job.num_tokens_left, total

    def run(self) -> None:
        """Steps until no request is left."""
        while not self.is_idle:
            self.step()

    # ---- One step.

    def step(self) -> None:
        """One piece of a prompt, one block of decoding steps, and the block before it read.

        On an idle engine the first token is read before the first block is handed over.
        """
        with self._devices():
            was_idle = not self.num_running
            self._advance_prefill()
            while self._fill_slots_first and self.num_waiting and None in self._streams:
                self._advance_prefill()
            if was_idle and self._pending and not self._fill_slots_first:
                self._read_all()
                return
            depth = len(self._pending)
            is_constrained = self._dispatch()
            # A constrained row needs its token before the next draw; else a block stays in flight.
            while len(self._pending) > (0 if is_constrained or len(self._pending) == depth else 1):
                self._read(self._pending.popleft())

    def _devices(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def _advance_prefill(self) -> None:
        if self._job is None and len(self._waiting) and None in self._streams:
            if self._start_known():
                return
            most = min(self._prefill_rows, self._streams.count(None))
            batch_sizes = self._fewest_rows, self._prefill_rows
            self._job = self._prefiller.next_job(self._waiting, most, batch_sizes)
        job = self._job
        if job is None:
            return
        if job.pieces and any(row.waiting for row in job.rows):
            job.advance()
        if not job.pieces:
            for index, row in enumerate(job.rows):
                for stream in row.waiting:
                    if None not in self._streams:
                        return
                    self._start(stream, job, index)
                    row.streams.remove(stream)
        if not any(row.waiting for row in job.rows):
            self._job = None
            if self._fewest_rows == 1:
                self._prefiller.prepare()

    def _start_known(self) -> bool:
        """Starts the next request at once if the prefix cache knows all but its last tokens."""
        prompt = self._known_prompts and self._known_prompts.find(self._waiting.peek())
        if not prompt:
            return False
        (stream,) = self._waiting.get()
        source = self._weights, prompt.states
        self._occupy(stream, stream.request.tokens, prompt.continuation, start_known_row, *source)
        return True

    def _start(self, stream: Stream, job: PrefillJob, index: int) -> None:
        if stream.request.prompt_logprobs is not None:
            scored = job.prompt_logprobs(index, stream.request.prompt_logprobs)
            # Tokens that waited in the session are not part of the prompt.
            stream.prompt_logprobs = scored[len(scored) - len(stream.request.prompt) :]
        if stream.request.keep_session and stream.request.params.stop:
            # A stop string is found on the host, after the slot has gone on: the session is then
            # the state after the prompt, and the answer's tokens wait in it.
            cache = extract_row(job.state.cache, index)
            stream.session = Session.take(cache, (), self._fingerprint)
        self._occupy(stream, job.rows[index].tokens, np.int32(index), start_row, job.state)

    def _occupy(
        self, stream: Stream, prompt: np.ndarray, place: Any, start: Callable[..., Any], *state: Any
    ) -> None:
        """Puts a stream into a free slot, and draws its first token by `start`."""
        slot, params = self._streams.index(None), stream.request.params
        if params.seed not in (None, stream.seed):
            params = dataclasses.replace(params, seed=stream.seed)
        features = covering([stream.request.features])
        packed = pack_start(
            slot, place, params, features, vocab_size=self._num_outputs,
            num_tokens=self._num_tokens, prompt=prompt, seed=stream.seed,
        )  # fmt: skip
        mask = logits_masks([stream], self._num_outputs)
        self._state, emitted = start(self._state, *state, packed, features, mask)
        self._streams[slot] = stream
        self._add_pending(emitted, [stream], 1)
        if self._speculator is not None:
            self._speculator.start(slot, prompt, emitted)

    def _dispatch(self) -> bool:
        """Hands a block to the device; whether a row in it is constrained."""
        self._compact()
        running = [stream for stream in self._streams if stream is not None]
        if not running:
            return False
        is_constrained = any(stream.request.logits_mask is not None for stream in running)
        if is_constrained:
            self._read_all()
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
            self._add_pending(emitted, streams, expected, is_speculative=True)
            return False
        length = block_length(
            remaining,
            is_short=self._short_blocks or self.num_waiting > 0,
            is_filling=self.num_waiting > 0 and None in self._streams,
            is_constrained=is_constrained,
        )
        mask = logits_masks(streams, self._num_outputs) if is_constrained else None
        self._state, emitted = decode_block(
            self._weights, self._state, rows, length, features, mask
        )
        self._add_pending(emitted, streams, length)
        if self._speculator is not None:
            self._speculator.add(emitted)
        return is_constrained

    def _add_pending(self, emitted: Emitted, *rest: Any, **options: bool) -> None:
        emitted.words.copy_to_host_async()
        self._pending.append(_Pending(emitted, *rest, **options))

    def _read_all(self) -> None:
        while self._pending:
            self._read(self._pending.popleft())

    def _read(self, pending: _Pending) -> None:
        emitted = jax.device_get(pending.emitted)
        tokens, logprobs, valid = emitted.tokens, emitted.logprobs, emitted.valid
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
                    entry = TokenLogprobs.take(logprobs, (step, column), wanted)
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
        has_ended = stream.finish_reason in ("stop", "length")
        if request.keep_session and has_ended and not request.params.stop:
            # The device stopped at the same token: the row's state has not changed since.
            row = extract_row((self._state.cache, self._state.token), slot)
            cache, token = row
            stream.session = Session.take(cache, (int(token[0]),), self._fingerprint)
        elif stream.session is not None:
            stop = () if stream.stop_id is None else (stream.stop_id,)
            stream.session = stream.session.with_pending((*stream.tokens, *stop))
        keep = np.ones(len(self._streams), bool)
        keep[slot] = False
        self._state = deactivate(self._state, keep)

    def _compact(self) -> None:
        """Moves the last row to the first free slot where a smaller bucket is then enough."""
        occupied = [i for i, stream in enumerate(self._streams) if stream is not None]
        if not occupied or self._buckets.of(len(occupied)) >= self._buckets.of(occupied[-1] + 1):
            return
        source, target = occupied[-1], self._streams.index(None)
        self._state = move_slot(self._state, source, target)
        if self._speculator is not None:
            self._speculator.move(source, target)
        self._streams[target], self._streams[source] = self._streams[source], None

    # ---- Start-up and sessions.

    def warm_up(
        self, features: Sequence[Features] = FEATURE_SETS, on_compiled: OnCompiled = None
    ) -> None:
        """Compiles every program that requests with these features need, several at a time.

        `on_compiled` is called with the number of compiled programs, by any thread. Afterwards
        nothing is compiled, whatever the requests, except those with a `logits_mask` or
        `prompt_logprobs`.
        """
        if not self.is_idle:
            raise RequestError("warm_up needs an engine without requests")
        with self._devices():
            self._compile(features, on_compiled)
            self._state = move_slot(self._state, 0, 1)
            self._state = deactivate(self._state, np.zeros(len(self._streams), bool))
            extract_row((self._state.cache, self._state.token), 0)
            jax.block_until_ready(self._state)

    def _compile(self, features: Sequence[Features], on_compiled: OnCompiled) -> None:
        batch_sizes = {self._fewest_rows, self._prefill_rows}
        examples = [self._prefiller.empty_state(rows) for rows in batch_sizes]
        known = self._known_prompts and self._known_prompts.example(examples[0].cache)
        sizes, speculator = self._buckets.sizes, self._speculator
        arguments = self._weights, self._state, sizes, features
        programs = list(slot_programs(self._weights, examples, known, sizes, features))
        every_program = itertools.chain(
            *map(self._prefiller.programs, batch_sizes),
            (program.of(self._state) for program in programs),
            () if speculator is None else speculator.programs(*arguments),
        )
        compile_programs(every_program, on_compiled)
        for rows in batch_sizes:
            self._prefiller.warm_up(rows)
        for program in programs:
            self._state = program.run(self._state)
        if speculator is not None:
            self._state = speculator.warm_up(self._weights, self._state, sizes, features)

    @functools.cached_property
    def _fingerprint(self) -> str:
        """Computed for the first session: it reads all weights."""
        return fingerprint(self._config, self._prefiller.params)

    def load_session(self, path: str | os.PathLike[str]) -> Session:
        """Reads a session that `Session.save` wrote.

        Raises:
          SessionError: the file is damaged, or the session belongs to another model or another
            format of keys and values.
        """
        with self._devices():
            empty = extract_row(self._prefiller.empty_state(self._fewest_rows).cache, 0)
            return Session.load(path, empty, self._fingerprint)
