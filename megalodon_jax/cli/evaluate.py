"""`megalodon evaluate`: held-out text, long contexts, problems with known answers."""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megalodon_jax.cli.command import WithCompilationCache
from megalodon_jax.cli.options import check_formats
from megalodon_jax.config import KvFormat, WeightFormat
from megalodon_jax.errors import ConfigError

if TYPE_CHECKING:
    from megalodon_jax.checkpoints import TrainedModel
    from megalodon_jax.evaluation import Evaluation
    from megalodon_jax.evaluation.costs import PrefillCost

EvaluationTask = Literal[
    "text",
    "examples",
    "perplexity_by_context",
    "loss_by_position",
    "passkey",
    "copy",
    "recall",
    "addition",
    "prefill_cost",
    "skip_attention",
]
# The same as in `evaluation`, whose modules import JAX.
KeyPosition = Literal["start", "middle", "end"]
AnswerMethod = Literal["teacher_forcing", "generation"]

_FILES = ("files", "text_field", "document_separator")
_ANSWERS = ("count", "seed", "method", "window", "tokens_per_call")
# The options of every task, besides those of the model and `json`.
_OPTIONS: dict[str, tuple[str, ...]] = {
    "text": (*_FILES, "batch_size", "piece_length", "weights", "kv"),
    "examples": ("best", "examples_path", "split", "picture"),
    "perplexity_by_context": (
        *_FILES, "contexts", "tail", "join", "max_tokens", "window", "tokens_per_call",
    ),
    "loss_by_position": (*_FILES, "join", "max_tokens", "window", "tokens_per_call"),
    "passkey": ("lengths", "positions", *_ANSWERS),
    "copy": ("distances", "size", *_ANSWERS),
    "recall": ("distances", "pairs", *_ANSWERS),
    "addition": ("digits", *_ANSWERS),
    "prefill_cost": ("lengths", "window", "rows", "repeats"),
    "skip_attention": (*_FILES, "skip", "max_tokens", "rows", "repeats", "tokens_per_call"),
}  # fmt: skip
_COUNTS = {"passkey": 20, "copy": 100, "recall": 100, "addition": 1024}
_POSITIVE = (
    "batch_size", "piece_length", "tokens_per_call", "max_tokens", "window", "lengths", "distances",
    "digits", "size", "pairs", "count", "rows", "repeats",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Evaluate(WithCompilationCache):
    """Evaluates a trained model: text files of any length, or a task with --task.

    Every task streams in constant device memory (a Transformer with full attention: a cache of the
    context). An option of another task is an error. The run of an encoder without --files takes the
    task examples.

    Example: megalodon evaluate --checkpoint runs/first --files a.txt "books/*.txt.gz"
    """

    checkpoint: str
    """The run_dir of a training run or one of its checkpoints, a path or a URL gs:// or s3://; a
    .safetensors file; or a folder in the Hugging Face form."""
    task: EvaluationTask = "text"
    """The measurement. With --files: bits per byte of whole documents (text), perplexity of blocks
    of several lengths (perplexity_by_context), the loss by a token's position (loss_by_position),
    loss and decoding time without the attention of the last blocks (skip_attention). Without
    --files: a number in a long text (passkey), random letters to repeat (copy), the value of a
    random key (recall), sums of reversed digits (addition), time and memory of prefill by length
    (prefill_cost). Of an encoder: the result of its run's task on held-out examples (examples)."""
    files: tuple[str, ...] = ()
    """Paths, folders, globs or URLs of text: plain, .jsonl (both also .gz, .zst), .parquet."""
    text_field: str = "text"
    """Field that holds the text in .jsonl and .parquet files."""
    document_separator: str = ""
    """Splits a plain text file into documents, such as `\\0` or `\\n\\n`; empty: a file is one."""
    batch_size: int = 8
    """text: most documents that are read side by side."""
    piece_length: int = 1024
    """text: tokens of a document that go through the model at a time."""
    weights: WeightFormat = "model"
    """text: format of the weights, in the model's dtype (model) or 8-bit integers (int8). With int8
    here or in --kv, every token goes through a decoding step, which is slow with few documents."""
    kv: KvFormat = "model"
    """text: format of keys and values, in the model's dtype (model) or 8-bit integers (int8)."""
    tokens_per_call: int = 16_384
    """Other tasks: tokens that go through the model at a time."""
    contexts: tuple[int, ...] = (4096, 16_384, 65_536, 262_144, 0)
    """perplexity_by_context: tokens of a block, which begins with the empty state; 0: a whole
    document."""
    tail: int = 1024
    """perplexity_by_context: tokens at the end of a block that are also scored by themselves."""
    join: bool = False
    """perplexity_by_context, loss_by_position: read all documents as one."""
    max_tokens: int | None = None
    """perplexity_by_context, loss_by_position, skip_attention: read only so many tokens of the
    text."""
    window: int | None = None
    """Sliding window of a Transformer's attention, in place of its own; its cache then has a
    constant size. Not for text and skip_attention."""
    lengths: tuple[int, ...] = (4096, 16_384, 32_768)
    """passkey, prefill_cost: exact tokens of a prompt, bos included."""
    positions: tuple[KeyPosition, ...] = ("start", "middle", "end")
    """passkey: where in the text the key is."""
    distances: tuple[int, ...] = (256, 1024, 4096, 16_384)
    """copy, recall: exact tokens from what is asked for to the answer."""
    digits: tuple[int, ...] = tuple(range(17, 41))
    """addition: digits of both numbers."""
    size: int = 16
    """copy: letters to repeat."""
    pairs: int = 8
    """recall: pairs of keys and values."""
    count: int | None = None
    """Problems of a task for every length, distance or number of digits; if not given, 20
    (passkey), 100 (copy, recall), 1024 (addition)."""
    seed: int = 0
    """Seed of the problems."""
    method: AnswerMethod = "teacher_forcing"
    """How answers are found: reading the right one, each token of which must be the most probable
    (the same exact match, cheaper), or greedy generation by the inference engine."""
    rows: int = 1
    """prefill_cost, skip_attention: prompts that are read, or rows that are decoded, side by
    side."""
    repeats: int = 3
    """prefill_cost, skip_attention: timed calls, after one for warm-up."""
    skip: tuple[int, ...] = (0, 1, 2)
    """skip_attention: numbers of last blocks whose attention is left out."""
    best: bool = False
    """examples: take the checkpoint of the best held-out result."""
    examples_path: str = ""
    """examples: where the examples (`examples.path`) are now; empty: where the run has read
    them."""
    split: Literal["valid", "test"] | None = None
    """examples: held-out part of data that has both; that of the run if not set."""
    picture: str = ""
    """examples: new SVG file with the confusion matrix."""
    json: str = ""
    """Also write the results to this file."""
    step: int | None = None
    """Step of the checkpoint; the newest if not set."""
    allow_unverified: bool = False
    """Also load a checkpoint without manifest, which an older version wrote."""
    tokenizer: str = ""
    """Tokenizer file to use instead of the copy in the run."""

    def run(self) -> int:
        """Prints the results: of `text` a line with bits per byte, of other tasks a table."""
        if self.task == "text" and not self.files and self._is_encoder():
            return dataclasses.replace(self, task="examples").run()
        self._check()
        if self.task == "examples":
            return self._evaluate_examples()
        with self.keep_programs():
            trained, results = self._evaluate()
        from megalodon_jax.evaluation.results import results_table, write_results

        print(_line(results[0]) if self.task == "text" else results_table(results))
        if self.json:
            write_results(
                self.json,
                results,
                model=trained.model,
                task=self.task,
                checkpoint=self.checkpoint,
                options={name: getattr(self, name) for name in _OPTIONS[self.task]},
            )
        return 0

    def _is_encoder(self) -> bool:
        from megalodon_jax.training.encoder_runs import is_encoder_run

        return is_encoder_run(self.checkpoint)

    def _evaluate_examples(self) -> int:
        from megalodon_jax.cli.encoders import evaluate_encoder

        if not self._is_encoder():
            raise ConfigError(f"--task examples is for runs of encoders; {self.checkpoint} is none")
        with self.keep_programs():
            line = evaluate_encoder(
                self.checkpoint,
                step=self.step,
                best=self.best,
                examples_path=self.examples_path,
                split=self.split,
                picture=self.picture,
                json_path=self.json,
            )
        print(line)
        return 0

    def _check(self) -> None:
        """Raises ConfigError for options that do not fit; the model is not loaded yet."""
        used = _OPTIONS[self.task]
        of_other_tasks = {name for names in _OPTIONS.values() for name in names} - {*used}
        for entry in dataclasses.fields(self):
            if entry.name in of_other_tasks and getattr(self, entry.name) != entry.default:
                raise ConfigError(
                    f"--{entry.name} is not an option of --task {self.task}, which has "
                    f"{', '.join(f'--{name}' for name in used)}"
                )
        if self.json and "://" not in self.json and not Path(self.json).parent.is_dir():
            raise ConfigError(f"--json is {self.json}, in a folder that does not exist")
        if "files" in used and not self.files:
            raise ConfigError(f"--task {self.task} reads text; name it with --files")
        for name in _POSITIVE:
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else (1 if value is None else value,)
            if not values or min(values) < 1:
                raise ConfigError(f"--{name} is {_text(value)}; use 1 or more")
        for name in ("contexts", "skip"):
            values = getattr(self, name)
            if not values or min(values) < 0:
                raise ConfigError(f"--{name} is {_text(values)}; use 0 or more")
        for name in ("tail", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name} is {getattr(self, name)}; use 0 or more")

    def _evaluate(self) -> "tuple[TrainedModel, Sequence[Any]]":
        from megalodon_jax.evaluation.variants import with_window
        from megalodon_jax.pretrained import load_with_tokenizer

        trained = load_with_tokenizer(
            self.checkpoint,
            step=self.step,
            allow_unverified=self.allow_unverified,
            tokenizer=self.tokenizer,
        )
        check_formats(trained.model, self.weights, self.kv)
        if self.window is not None:
            trained = trained._replace(model=with_window(trained.model, self.window))
        return trained, self._results(trained)

    def _results(self, trained: "TrainedModel") -> Sequence[Any]:
        from megalodon_jax import evaluation
        from megalodon_jax.evaluation.streaming import open_text_files

        options: dict[str, Any] = {
            name: getattr(self, name) for name in _OPTIONS[self.task] if name != "window"
        }
        if "count" in options and self.count is None:
            options["count"] = _COUNTS[self.task]
        if self.task == "text":
            return (evaluation.evaluate_files(*trained, **options),)
        if self.task == "prefill_cost":
            # Long prompts take minutes on a CPU.
            return evaluation.prefill_cost(trained.model, **options, on_result=_show_prefill)
        if "skip" in options:
            options["skips"] = options.pop("skip")
        if self.files:
            source = open_text_files(*(options.pop(name) for name in _FILES))
            texts = (document.text for document in source)
            return getattr(evaluation, self.task)(*trained, texts, **options)
        return getattr(evaluation, f"{self.task}_accuracy")(*trained, **options)


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _show_prefill(cost: "PrefillCost") -> None:
    seconds = "does not fit" if cost.seconds is None else f"{cost.seconds:.3f} s"
    print(f"prefill of {cost.rows} x {cost.length:,} tokens: {seconds}", file=sys.stderr)


def _line(result: "Evaluation") -> str:
    return (
        f"bits per byte {result.bits_per_byte:.4f}  "
        f"perplexity per token {result.perplexity:.4f}  "
        f"tokens {result.num_tokens:,}  bytes {result.num_bytes:,}"
    )
