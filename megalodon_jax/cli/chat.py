"""`megalodon chat`: a conversation with a trained model in the terminal."""

import contextlib
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import tyro

from megalodon_jax.cli.command import WithCompilationCache
from megalodon_jax.cli.options import DecodingOptions, ModelOptions, SamplingOptions
from megalodon_jax.cli.progress import Progress
from megalodon_jax.errors import CheckpointError, ConfigError, MegalodonError, did_you_mean

if TYPE_CHECKING:
    from megalodon_jax.inference.conversation import Conversation, ConversationState
    from megalodon_jax.inference.sampling_params import SamplingParams

_HELP = """\
/save FILE  writes the conversation's state to a file
/load FILE  continues the conversation in a file
/fork       begins a branch at this point; /fork N goes to branch N
/reset      begins anew
/help       shows this list
/exit       ends (also Ctrl-D)
Ctrl-C stops an answer; what there is of it stays."""


@dataclass(frozen=True, kw_only=True)
class Chat(SamplingOptions, DecodingOptions, ModelOptions, WithCompilationCache):
    """A conversation with a trained model; its state is kept between turns and in files.

    Lines that begin with / are commands; /help lists them.

    Example: megalodon chat runs/first --chat_template plain
    """

    chat_template: str = ""
    """`plain`, or a Jinja file; by default the tokenizer's own. Without any of them, and with
    `none`, the model continues the text as it is."""
    max_tokens: int = 512
    """Most tokens of an answer."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """An answer ends before this text; may be repeated."""
    seed: int | None = None
    """Seed of the random numbers of every answer; by default answers have different ones."""
    max_length: int = 16384
    """Most tokens of a conversation with a Transformer; MEGALODON has no limit."""

    def run(self) -> int:
        """Reads lines until /exit or the end of the input."""
        params = self.sampling_params()
        with self.keep_programs():
            with Progress() as progress:
                progress.show("starting")
                conversation = self._conversation(params, progress)
            return _Terminal(conversation).run()

    def _conversation(self, params: "SamplingParams", progress: Progress) -> "Conversation":
        # Local imports: help and errors come without JAX.
        from megalodon_jax.data.chat_template import ChatTemplate
        from megalodon_jax.generate import max_length
        from megalodon_jax.inference.conversation import Conversation
        from megalodon_jax.inference.engine import Engine

        model, tokenizer = self.load(progress)
        if self.chat_template == "none":
            template = None
        elif self.chat_template:
            template = ChatTemplate.load(self.chat_template)
        else:
            template = ChatTemplate.of_tokenizer(tokenizer)
        room = max_length(model, self.max_length)
        engine = Engine(
            model,
            slots=2,
            tokenizer=tokenizer,
            max_length=room,
            short_blocks=True,
            **self.formats(model),
        )
        return Conversation(engine, params, template)


class _CtrlC:
    """Notes Ctrl-C: an exception in the middle of a step would leave the engine without a state."""

    def __init__(self) -> None:
        self.is_set = False

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: object) -> None:
        del number, frame
        self.is_set = True


class _Terminal:
    """Reads lines, runs commands, prints answers as they come."""

    def __init__(self, conversation: "Conversation"):
        self._conversation = conversation
        self._is_interactive = sys.stdin.isatty()
        # Branch i + 1 has the state at which it was left.
        self._branches: list[ConversationState] = [conversation.state]
        self._branch = 0
        self._commands: Mapping[str, Callable[[str], None]] = {
            "/save": self._save,
            "/load": self._load,
            "/fork": self._fork,
            "/reset": self._reset,
            "/help": lambda _: print(_HELP),
        }

    def run(self) -> int:
        """Runs to /exit or the end of the input."""
        if self._is_interactive:
            # Lines can be edited, and the arrow keys give earlier ones.
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401
            print("/help lists the commands.")
        while True:
            try:
                line = input("> " if self._is_interactive else "")
            except EOFError:
                print()
                return 0
            except KeyboardInterrupt:
                print("\n/exit ends.")
                continue
            if line.strip() == "/exit":
                return 0
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._answer(line)

    def _command(self, line: str) -> None:
        name, _, argument = line.strip().partition(" ")
        if name not in self._commands:
            hint = did_you_mean(name, self._commands) or "; /help lists the commands"
            print(f"unknown command {name}{hint}")
            return
        try:
            self._commands[name](argument.strip())
        except (MegalodonError, OSError) as error:
            print(f"error: {error}")

    def _answer(self, text: str) -> None:
        try:
            with _CtrlC() as ctrl_c, contextlib.closing(self._conversation.say(text)) as pieces:
                for piece in pieces:
                    print(piece, end="", flush=True)
                    if ctrl_c.is_set:
                        print(" [stopped]", end="")
                        break
        except MegalodonError as error:
            print(f"error: {error}", end="")
        print(flush=True)
        if self._conversation.finish_reason == "invalid":
            raise CheckpointError("the scores of the model are NaN")

    def _save(self, path: str) -> None:
        if not path:
            raise ConfigError("give a file: /save talk.session")
        self._conversation.save(path)
        print(f"saved {self._conversation.state.num_tokens:,} tokens to {path}")

    def _load(self, path: str) -> None:
        if not path:
            raise ConfigError("give a file: /load talk.session")
        self._conversation.load(path)
        print(f"loaded {self._conversation.state.num_tokens:,} tokens from {path}")

    def _fork(self, number: str) -> None:
        self._branches[self._branch] = self._conversation.state
        if not number:
            self._branches.append(self._conversation.state)
            before, self._branch = self._branch + 1, len(self._branches) - 1
            print(f"branch {self._branch + 1}; /fork {before} goes back to branch {before}")
            return
        if not number.isdecimal() or not 1 <= int(number) <= len(self._branches):
            raise ConfigError(f"there are branches 1 to {len(self._branches)}, not {number}")
        self._branch = int(number) - 1
        self._conversation.state = self._branches[self._branch]
        print(f"branch {number}, {self._conversation.state.num_tokens:,} tokens")

    def _reset(self, argument: str) -> None:
        del argument
        self._conversation.state = type(self._conversation.state)()
        print("a new conversation")
