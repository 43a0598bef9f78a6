"""The `megalodon` command: train, evaluate, generate, convert, plan, bench.

Exit codes: 0 done (also after SIGTERM with a checkpoint saved), 1 the run failed, 2 the command or
the configuration is wrong, 130 stopped by Ctrl-C with a checkpoint saved.
"""

import difflib
import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megalodon_jax.config import TrainConfig, load_config
from megalodon_jax.errors import ConfigError
from megalodon_jax.presets import configs_dir

DEBUG_VARIABLE = "MEGALODON_DEBUG"


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Continues a prompt with a trained model and prints the text as it comes."""

    checkpoint: str
    """The run_dir of a training run."""
    prompt: str = ""
    """Start of the text."""
    max_tokens: int = 256
    """Most tokens to add; the text ends earlier where the model ends the document."""
    temperature: float = 0.8
    """Divides the scores; 0 always takes the most probable token."""
    top_k: int = 0
    """Draw only from this many most probable tokens; 0: from all."""
    top_p: float = 1.0
    """Draw only from the smallest set of most probable tokens whose probability reaches this."""
    seed: int = 0
    """Seed of the draws."""
    step: int | None = None
    """Which checkpoint; the newest if not set."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Measures a trained model on text files of any length, in constant device memory."""

    checkpoint: str
    """The run_dir of a training run."""
    files: tuple[str, ...]
    """Paths or globs of text: plain, .gz, .jsonl, .parquet."""
    text_field: str = "text"
    """Field that holds the text in .jsonl and .parquet files."""
    document_separator: str = ""
    """Splits a plain text file into documents; empty: a file is a document."""
    batch_size: int = 8
    """Documents that are read side by side, at most."""
    piece_length: int = 1024
    """Tokens of a document that go through the model at a time."""
    step: int | None = None
    """Which checkpoint; the newest if not set."""


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Converts a released checkpoint to this project's form, or back."""

    source: Annotated[str, tyro.conf.Positional]
    """What to convert."""
    target: Annotated[str, tyro.conf.Positional]
    """Where the result goes; nothing is overwritten."""
    config: str | None = None
    """TOML file or preset's name for the model's shape, if the source does not say."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the process's exit code.

    Args:
      argv: arguments after the program's name; None: those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or bool(os.environ.get(DEBUG_VARIABLE))
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"megalodon: unknown command {name!r}{_hint(name, COMMANDS)}", file=sys.stderr)
        return 2
    if not debug:
        # Orbax reports a failed save with hundreds of lines of tracebacks before it raises.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
    return _run(COMMANDS[name], rest, debug=debug)


def _run(command: Callable[[list[str]], int], arguments: list[str], *, debug: bool) -> int:
    try:
        return command(arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt as stop:
        print("megalodon: stopped at once, nothing saved", file=sys.stderr)
        return _exit_code(stop)
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); the rest has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, RuntimeError, OSError, OverflowError) as error:
        if debug:
            raise
        print(f"megalodon: error: {error}", file=sys.stderr)
        if not _is_ours(error):
            print(f"megalodon: set {DEBUG_VARIABLE}=1 for the traceback", file=sys.stderr)
        return _exit_code(error)


def _exit_code(error: Exception | KeyboardInterrupt) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    return 2 if isinstance(error, ConfigError) else 1


def _is_ours(error: Exception) -> bool:
    return isinstance(error, OSError) or type(error).__module__.startswith("megalodon_jax")


def _train(arguments: list[str]) -> int:
    path, rest = _split_config(arguments)
    default = TrainConfig() if path is None else load_config(find_config(path))
    config = tyro.cli(
        TrainConfig,
        default=default,
        args=rest,
        prog="megalodon train CONFIG.toml",
        description="Trains a model as CONFIG.toml says; every setting can be changed here.",
        use_underscores=True,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    if path is None:
        raise ConfigError(f"no config given; name a TOML file or one of: {', '.join(shipped())}")
    from megalodon_jax.parallel.distributed import exit_without_barrier
    from megalodon_jax.training.loop import train

    try:
        result = train(config)
    except (Exception, KeyboardInterrupt) as error:
        exit_without_barrier(_exit_code(error))
        raise
    return 128 + signal.SIGINT if result.stop_signal == signal.SIGINT else 0


def _generate(arguments: list[str]) -> int:
    options = _parse(GenerateOptions, arguments, "generate")
    import jax

    from megalodon_jax.checkpoints import load_trained
    from megalodon_jax.generate import Sampling, stream_text

    try:
        sampling = Sampling(
            temperature=options.temperature, top_k=options.top_k, top_p=options.top_p
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    model, tokenizer = load_trained(options.checkpoint, options.step)
    print(options.prompt, end="", flush=True)
    for text in stream_text(
        model,
        tokenizer,
        options.prompt,
        max_tokens=options.max_tokens,
        sampling=sampling,
        key=jax.random.key(options.seed),
    ):
        print(text, end="", flush=True)
    print()
    return 0


def _evaluate(arguments: list[str]) -> int:
    options = _parse(EvaluateOptions, arguments, "evaluate")
    from megalodon_jax.checkpoints import load_trained
    from megalodon_jax.evaluation.streaming import evaluate_files

    model, tokenizer = load_trained(options.checkpoint, options.step)
    result = evaluate_files(
        model,
        tokenizer,
        options.files,
        text_field=options.text_field,
        document_separator=options.document_separator,
        batch_size=options.batch_size,
        piece_length=options.piece_length,
    )
    print(
        f"bits per byte {result.bits_per_byte:.4f}  perplexity per token {result.perplexity:.4f}  "
        f"tokens {result.num_tokens:,}  bytes {result.num_bytes:,}"
    )
    return 0


def _convert(arguments: list[str]) -> int:
    options = _parse(ConvertOptions, arguments, "convert")
    from megalodon_jax.interop.convert import convert

    convert(options.source, options.target, options.config)
    return 0


def _plan(arguments: list[str]) -> int:
    from megalodon_jax.plan.cli import main as plan

    return plan(arguments)


def _bench(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: megalodon bench {{{','.join(BENCHMARKS)}}} [options]")
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in BENCHMARKS:
        raise ConfigError(f"unknown benchmark {name!r}{_hint(name, BENCHMARKS)}")
    return importlib.import_module(BENCHMARKS[name]).main(rest)


def _hint(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; use one of {', '.join(known)}"


def find_config(name: str) -> Path:
    """A TOML file's path as given, or a shipped configuration's by its name.

    Raises:
      ConfigError: there is neither; the closest shipped name is suggested.
    """
    if name.endswith(".toml") or Path(name).is_file():
        return Path(name)
    if name in shipped():
        return configs_dir() / f"{name}.toml"
    close = difflib.get_close_matches(name, shipped(), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else f"; shipped: {', '.join(shipped())}"
    raise ConfigError(f"no config file or shipped config {name!r}{hint}")


def shipped() -> list[str]:
    """Names of the training configurations that come with the project."""
    return sorted(path.stem for path in configs_dir().glob("*.toml"))


def _split_config(arguments: list[str]) -> tuple[str | None, list[str]]:
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    return None, arguments


def _parse[T](options: type[T], arguments: list[str], name: str) -> T:
    return tyro.cli(options, args=arguments, prog=f"megalodon {name}", use_underscores=True)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "evaluate": _evaluate,
    "generate": _generate,
    "convert": _convert,
    "plan": _plan,
    "bench": _bench,
}
# Modules with a `main` that takes the arguments.
BENCHMARKS = {
    "agreement": "megalodon_jax.bench.agreement",
    "ops": "megalodon_jax.bench.ops",
    "reference": "megalodon_jax.bench.reference",
    "scaling": "megalodon_jax.bench.scaling",
    "train": "megalodon_jax.bench.train",
}


def _usage() -> str:
    return (
        "usage: megalodon COMMAND [options]\n\n"
        "  train CONFIG.toml [--run_dir DIR] [--resume] [--optim.lr 3e-4 ...]\n"
        "  evaluate --checkpoint RUN_DIR --files a.txt b.txt\n"
        '  generate --checkpoint RUN_DIR --prompt "def "\n'
        "  convert SOURCE TARGET [--config CONFIG.toml]\n"
        "  plan --config CONFIG.toml --topology v5p:4x4x8 [--mesh.data 128] [--sweep]\n"
        "  bench ops [--op cema] [--check]\n"
        "  bench train [--preset mega200M] [--profile]\n"
        "  bench scaling | agreement [--preset mega1.3B]\n\n"
        f"Shipped configs: {', '.join(shipped())}. `megalodon COMMAND --help` lists the options; "
        "--debug shows tracebacks."
    )
