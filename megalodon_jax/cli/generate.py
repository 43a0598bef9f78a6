"""`megalodon generate`: continues prompts with a trained model."""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from megalodon_jax.cli.command import WithCompilationCache
from megalodon_jax.cli.completions import Completions
from megalodon_jax.cli.interrupt import Interrupt
from megalodon_jax.cli.options import DecodingOptions, ModelOptions, SamplingOptions
from megalodon_jax.cli.progress import Progress
from megalodon_jax.cli.prompts import Prompt, command_line_prompts, read_prompts
from megalodon_jax.errors import CheckpointError, ConfigError, RequestError

if TYPE_CHECKING:
    from megalodon_jax.inference.engine import Engine
    from megalodon_jax.inference.requests import Request, Stream


@dataclass(frozen=True, kw_only=True)
class Generate(SamplingOptions, DecodingOptions, ModelOptions, WithCompilationCache):
    """Continues prompts with a trained model.

    The text of one prompt is printed as it comes; several prompts, samples or log-probabilities
    give a line of JSON for each prompt.

    Example: megalodon generate runs/first "def "
    """

    prompts: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")] = ()
    """Starts of texts; `-`, or no prompt: the text of standard input."""
    prompts_file: str = ""
    """File with a prompt a line; .jsonl: objects with "prompt" and optionally "id", "n" and the
    sampling parameters of this list."""
    output: str = ""
    """File for the lines of JSON; prompts whose id it has are skipped, so that the same command
    continues after an interruption."""
    session: str = ""
    """File with the state of a conversation: continued if it exists, and written at the end."""
    max_tokens: int = 256
    """Number of tokens to generate at most; the text ends earlier if the document does."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once per occurrence in the output."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """The text ends before this text; may be repeated."""
    logprobs: int | None = None
    """Also give log-probabilities of the drawn and the n most probable tokens."""
    n: int = 1
    """Samples of each prompt."""
    seed: int = 0
    """Seed of the random numbers; sample i of prompt j draws with seed + j n + i."""
    slots: int = 16
    """Most samples that run at the same time."""

    def run(self) -> int:
        """Prints the continuations."""
        prompts = self._prompts()
        is_text = self._is_text(prompts)
        completions = None if is_text else Completions(self.output, prompts)
        with Progress() as progress:
            progress.show("starting")
            with self.keep_programs():
                if completions is None:
                    return _print_text(self, prompts[0], progress)
                return _write_lines(self, completions, progress)

    def _prompts(self) -> list[Prompt]:
        params = self.sampling_params()
        if self.n < 1:
            raise ConfigError(f"n is {self.n}; use 1 or more")
        if self.slots < 2:
            raise ConfigError(f"slots is {self.slots}; use 2 or more")
        if self.prompts_file and self.prompts:
            raise ConfigError("prompts and --prompts_file are both given; give one of them")
        if self.prompts_file:
            prompts = read_prompts(self.prompts_file, params, self.n)
        else:
            prompts = command_line_prompts(self.prompts, params, self.n)
        if self.session and not self._is_text(prompts):
            raise ConfigError("--session needs a single prompt and sample, printed as text")
        return prompts

    def _is_text(self, prompts: Sequence[Prompt]) -> bool:
        has_lines = self.output or self.prompts_file or self.logprobs is not None
        return len(prompts) == 1 and self.n == 1 and not has_lines


def _print_text(command: Generate, prompt: Prompt, progress: Progress) -> int:
    """Prints one continuation as it comes."""
    model, tokenizer = command.load(progress)
    from megalodon_jax.generate import max_length, text_request
    from megalodon_jax.inference.engine import Engine

    progress.show("compiling")
    request = text_request(tokenizer, prompt.text, prompt.params)
    session = Path(command.session) if command.session else None
    # A session grows: a cache with a fixed room could not be continued.
    room = None if session else max_length(model, len(request.prompt) + prompt.params.max_tokens)
    engine = Engine(
        model,
        slots=2,
        tokenizer=tokenizer,
        max_length=room,
        short_blocks=True,
        **command.formats(model),
    )
    if session is not None:
        request = dataclasses.replace(request, keep_session=True)
    if session is not None and session.exists():
        # The first token begins a document; the session goes on with one.
        request = dataclasses.replace(
            request, prompt=request.prompt[1:], session=engine.load_session(session)
        )
    stream = engine.submit(request)
    is_argument = bool(command.prompts) and command.prompts[0] == prompt.text
    try:
        with Interrupt() as interrupt:
            _prefill(engine, stream, progress, interrupt)
            progress.clear()
            if is_argument:
                print(prompt.text, end="", flush=True)
            for text in stream.iterate_text():
                print(text, end="", flush=True)
                interrupt.check()
    except KeyboardInterrupt:
        progress.clear()
        print(flush=True)
        raise
    print(flush=True)
    if stream.finish_reason == "invalid":
        raise CheckpointError(f"the scores of the model in {command.run_dir} are NaN")
    if session is not None and stream.session is not None:
        stream.session.save(session)
    return 0


def _prefill(engine: "Engine", stream: "Stream", progress: Progress, interrupt: Interrupt) -> None:
    """Steps until the first token."""
    while not stream.tokens and not stream.is_finished:
        interrupt.check()
        engine.step()
        if (seen := engine.prefill_progress) is not None:
            progress.show(f"prompt {seen[0]:,}/{seen[1]:,} tokens")


def _write_lines(command: Generate, completions: Completions, progress: Progress) -> int:
    """Writes a line of JSON for each prompt."""
    prompts = completions.remaining
    if not prompts:
        return 0
    model, tokenizer = command.load(progress)
    from megalodon_jax.generate import Completion, max_length, text_request
    from megalodon_jax.inference.engine import Engine

    progress.show("compiling")
    requests = [text_request(tokenizer, prompt.text, prompt.params) for prompt in prompts]
    most = max(prompt.n for prompt in prompts)
    samples = sum(prompt.n for prompt in prompts)
    longest = max(len(each.prompt) + each.params.max_tokens for each in requests)
    engine = Engine(
        model,
        slots=max(2, most, min(samples, command.slots)),
        tokenizer=tokenizer,
        max_length=max_length(model, longest),
        fixed_bucket=True,
        fill_slots_first=True,
        **command.formats(model),
    )
    jobs = iter(zip(prompts, requests, strict=True))
    with Interrupt() as interrupt:
        results = _run(engine, jobs, progress, interrupt)
        for finished, (prompt, streams) in enumerate(results, start=1):
            progress.clear()
            completions.write(prompt, [Completion.of(stream) for stream in streams])
            progress.show(f"{finished:,}/{len(prompts):,} prompts")
    return 0


def _run(
    engine: "Engine",
    jobs: Iterator[tuple[Prompt, "Request"]],
    progress: Progress,
    interrupt: Interrupt,
) -> Iterator[tuple[Prompt, list["Stream"]]]:
    """Runs requests; yields the samples of a prompt when all of them have ended."""
    running: collections.deque[tuple[Prompt, list[Stream]]] = collections.deque()
    is_open = True
    while is_open or running:
        # A short queue: the engine always finds a prompt for a free slot.
        while is_open and engine.num_waiting < 2:
            job = next(jobs, None)
            is_open = job is not None
            if job is not None:
                prompt, request = job
                running.append((prompt, _submit(engine, prompt, request)))
        engine.step()
        interrupt.check()
        if (seen := engine.prefill_progress) is not None:
            progress.show(f"prompt {seen[0]:,}/{seen[1]:,} tokens")
        for _ in range(len(running)):
            prompt, streams = running.popleft()
            if all(stream.is_finished for stream in streams):
                yield prompt, streams
            else:
                running.append((prompt, streams))


def _submit(engine: "Engine", prompt: Prompt, request: "Request") -> list["Stream"]:
    try:
        return engine.submit_samples(request, prompt.n)
    except RequestError as error:
        raise RequestError(f"prompt {prompt.id!r}: {error}") from error
