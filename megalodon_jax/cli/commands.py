"""The commands of `megalodon`: their options, and what each of them runs.

Importing this module is cheap: a command imports JAX when it runs.
"""

import functools
import importlib
import operator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from megalodon_jax.bench import options as bench
from megalodon_jax.cli.chat import Chat
from megalodon_jax.cli.command import Command
from megalodon_jax.cli.encoders import Classify, Embed
from megalodon_jax.cli.evaluate import Evaluate
from megalodon_jax.cli.examples import Examples
from megalodon_jax.cli.generate import Generate
from megalodon_jax.cli.help import described
from megalodon_jax.cli.run_config import RunSettings, to_config
from megalodon_jax.cli.serve import Serve
from megalodon_jax.cli.study import StudyCommand
from megalodon_jax.config import load_config
from megalodon_jax.errors import ConfigError
from megalodon_jax.plan.options import PlanOptions
from megalodon_jax.presets import find_config

Config = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]


Settings = Annotated[RunSettings, tyro.conf.arg(name="")]
_PlanOptions = described(PlanOptions)
if TYPE_CHECKING:
    PlanSettings = PlanOptions
else:
    PlanSettings = Annotated[_PlanOptions, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class Train:
    """Trains a model as CONFIG says; every setting can be changed by an option.

    Example: megalodon train first_run --run_dir runs/first --optim.lr 3e-3
    """

    config: Config
    """A TOML file, or the name of a shipped one."""
    settings: Settings = field(default_factory=RunSettings)

    def run(self) -> int:
        """Trains to the end or a signal."""
        from megalodon_jax.cli.exit_codes import exit_code, signal_exit_code
        from megalodon_jax.parallel.distributed import exit_without_barrier
        from megalodon_jax.training.loop import train

        try:
            result = train(to_config(self.settings))
        except (Exception, KeyboardInterrupt) as error:
            exit_without_barrier(exit_code(error))
            raise
        return signal_exit_code(result.stop_signal)


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Compares all files of a run's checkpoints with their checksums; changes nothing.

    Example: megalodon verify runs/first
    """

    run_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """The run_dir of a training run; a path, or a URL gs:// or s3://."""

    def run(self) -> int:
        """Prints the state of every checkpoint; the exit code is 1 unless all are good."""
        from megalodon_jax.checkpoints import verify_run

        reports = verify_run(self.run_dir)
        for report in reports:
            print(report)
        return 0 if all(report.state == "good" for report in reports) else 1


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Converts between released checkpoints, .safetensors files, runs and the Hugging Face form.

    Example: megalodon convert runs/first first_hf/
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A run_dir or one of its checkpoints (also a URL gs:// or s3://), a .safetensors file, a
    folder in the Hugging Face form, or a released checkpoint."""
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    """Where to write: a .safetensors file or a new folder; nothing is overwritten. A run_dir may
    be a URL."""
    config: str | None = None
    """TOML file or preset with the model's shape, if the source has no config."""
    to: Literal["run", "huggingface"] | None = None
    """Form of a folder; by default that of Hugging Face from a run, and a run_dir from others."""
    tokenizer: str = ""
    """File of the model's tokenizer, or "bytes", if the source has none."""
    max_shard_bytes: int = 5_000_000_000
    """Most bytes of a file of weights in the Hugging Face form."""
    push: str = ""
    """Repository OWNER/NAME of the Hugging Face hub to which the folder is uploaded."""
    allow_unverified: bool = False
    """Also read a run's checkpoint without manifest, which an older version wrote."""
    merge: bool = False
    """Merge the LoRA factors of a run into its base; without it a folder gets the factors alone, in
    the files of PEFT."""
    base: str = ""
    """Where the base of a run with LoRA is now, if it has been moved."""
    special_tokens: tuple[str, ...] = ()
    """Special tokens to add to the tokenizer, such as "<|im_start|>" "<|im_end|>"; their rows in
    the model are the mean of the old ones."""

    def run(self) -> int:
        """Says what was written."""
        from megalodon_jax.interop.convert import convert

        line = convert(
            self.source,
            self.target,
            self.config,
            to=self.to,
            tokenizer=self.tokenizer,
            max_shard_bytes=self.max_shard_bytes,
            push=self.push,
            allow_unverified=self.allow_unverified,
            merge=self.merge,
            base=self.base,
            special_tokens=self.special_tokens,
        )
        print(line)
        return 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Compiles a run's training step for hardware you do not have, and prints what it costs.

    Example: megalodon plan paper_7b --topology v5p:4x4x8 --mesh.data 128
    """

    config: Config
    """A TOML file, or the name of a shipped one."""
    options: PlanSettings = field(default_factory=_PlanOptions)
    settings: Settings = field(default_factory=RunSettings)

    def run(self) -> int:
        """Prints the plan; the exit code is 1 if it does not fit."""
        from megalodon_jax.plan.run import run

        return run(self.options, to_config(self.settings))


# Modules of `megalodon_jax.bench`, with the options of their `run`.
BENCHMARKS: dict[str, type] = {
    "ops": bench.BenchOpsOptions,
    "train": bench.BenchTrainOptions,
    "decode": bench.BenchDecodeOptions,
    "decode_kernels": bench.BenchDecodeKernelsOptions,
    "engine": bench.BenchEngineOptions,
    "scaling": bench.BenchScalingOptions,
    "agreement": bench.BenchAgreementOptions,
    "reference": bench.BenchReferenceOptions,
    "tpu_estimates": bench.BenchTpuEstimatesOptions,
    "cema_memory": bench.BenchCemaMemoryOptions,
    "loader": bench.BenchLoaderOptions,
}
if TYPE_CHECKING:
    Benchmark = object
else:
    Benchmark = functools.reduce(
        operator.or_,
        [
            Annotated[described(options), tyro.conf.subcommand(name)]
            for name, options in BENCHMARKS.items()
        ],
    )


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measures speed, memory and accuracy on your device.

    Example: megalodon bench train --preset mega200M --profile
    """

    benchmark: Annotated[Benchmark, tyro.conf.arg(name="")]

    def run(self) -> int:
        """Runs one benchmark."""
        (name,) = (name for name, kind in BENCHMARKS.items() if isinstance(self.benchmark, kind))
        return importlib.import_module(f"megalodon_jax.bench.{name}").run(self.benchmark)


@dataclass(frozen=True, kw_only=True)
class Tune:
    """Finds the fastest implementation of every operation on your device, for CONFIG's shapes.

    Example: megalodon tune first_run
    """

    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")] = ""
    """A TOML file, or the name of a shipped one."""
    reset: bool = False
    """Remove what was measured: the defaults apply again."""

    def run(self) -> int:
        """Prints the table and writes the choices to the user's cache."""
        from pallas_kernels.common.measured_choice import choices_file, reset_choices

        if self.reset:
            removed = "removed" if reset_choices() else "nothing was measured:"
            print(f"{removed} {choices_file()}")
        if not self.config:
            if self.reset:
                return 0
            raise ConfigError("no config given; name a TOML file or a shipped configuration")
        from megalodon_jax.bench.tune import run

        return run(load_config(find_config(self.config)))


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Trains a tokenizer on text; `data.tokenizer` reads the file.

    Example: megalodon tokenizer train "books/*.txt" --vocab_size 32000 --output tokenizer.json
    """

    action: Annotated[Literal["train"], tyro.conf.Positional]
    """The action to run."""
    files: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILES")]
    """Paths, folders, globs or URLs of text: plain, .jsonl (both also .gz, .zst), .parquet."""
    vocab_size: int
    """Number of ids, the boundary tokens <s> and </s> included."""
    output: str = "tokenizer.json"
    """New file: .json of `tokenizers`, or .model of `sentencepiece`."""
    library: Literal["tokenizers", "sentencepiece"] = "tokenizers"
    """Library that trains it."""
    text_field: str = "text"
    """Field that holds the text in .jsonl and .parquet files."""
    document_separator: str = ""
    """Splits a plain text file into documents, such as `\\0` or `\\n\\n`; empty: a file is one."""
    max_bytes: int = 1 << 30
    """Most bytes of text to read, a share of every document."""

    def run(self) -> int:
        """Says what was written."""
        from megalodon_jax.data.train_tokenizer import train_tokenizer

        size = train_tokenizer(
            self.files,
            self.output,
            vocab_size=self.vocab_size,
            library=self.library,
            text_field=self.text_field,
            document_separator=self.document_separator,
            max_bytes=self.max_bytes,
        )
        print(
            f"{self.output}: {size:,} ids; set data.tokenizer to this path and model.vocab_size to "
            f"{size} or more"
        )
        return 0


COMMANDS: dict[str, type[Command]] = {
    "train": Train,
    "evaluate": Evaluate,
    "examples": Examples,
    "classify": Classify,
    "embed": Embed,
    "generate": Generate,
    "chat": Chat,
    "serve": Serve,
    "verify": Verify,
    "convert": Convert,
    "plan": Plan,
    "study": StudyCommand,
    "tune": Tune,
    "tokenizer": Tokenizer,
    "bench": Bench,
}
