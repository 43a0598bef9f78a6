"""`megalodon examples`: training examples of problems with one right answer."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from megalodon_jax.cli.command import WithCompilationCache
from megalodon_jax.cli.evaluate import KeyPosition
from megalodon_jax.errors import ConfigError

if TYPE_CHECKING:
    from megalodon_jax.evaluation.problems import AnyProblem

ProblemName = Literal["passkey", "copy", "recall", "addition"]
# The options of every problem, besides those that all have.
_OPTIONS: dict[str, tuple[str, ...]] = {
    "passkey": ("lengths", "positions", "tokenizer"),
    "copy": ("distances", "size", "tokenizer"),
    "recall": ("distances", "pairs", "tokenizer"),
    "addition": ("digits", "label_with", "tokenizer"),
}


@dataclass(frozen=True, kw_only=True)
class Examples(WithCompilationCache):
    """Writes training examples (task = "sft") of the problems of `evaluate --task`.

    No example is one of the problems by which `evaluate` tests. Problems of several lengths,
    distances or digits take turns.

    Example: megalodon examples addition --out addition.jsonl --count 100000 --digits 1 2 3 4
    """

    problem: Annotated[ProblemName, tyro.conf.Positional, tyro.conf.arg(metavar="PROBLEM")]
    """The problem: passkey, copy, recall or addition."""
    out: str
    """New .jsonl file, a line with prompt and response for every example."""
    count: int
    """Number of examples."""
    seed: int = 0
    """Seed of the examples."""
    lengths: tuple[int, ...] = (4096,)
    """passkey: exact tokens of a prompt, bos included."""
    positions: tuple[KeyPosition, ...] = ("start", "middle", "end")
    """passkey: where in the text the key is."""
    distances: tuple[int, ...] = (256, 512, 1024)
    """copy, recall: exact tokens from what is asked for to the answer."""
    digits: tuple[int, ...] = tuple(range(1, 17))
    """addition: digits of both numbers."""
    size: int = 16
    """copy: letters to repeat."""
    pairs: int = 8
    """recall: pairs of keys and values."""
    tokenizer: str = "bytes"
    """Tokenizer that counts lengths and distances: bytes, or a file."""
    label_with: str = ""
    """addition: a run_dir or checkpoint whose model gives the answers itself, greedily (a round of
    self-improvement); needs one number of digits. Its own tokenizer is used."""

    def run(self) -> int:
        """Says what was written."""
        self._check()
        if self.label_with:
            with self.keep_programs():
                print(self._write_labelled())
            return 0
        from megalodon_jax.data.tokenizer import load_tokenizer
        from megalodon_jax.evaluation.examples import write_examples

        write_examples(
            self.out,
            self._kinds(),
            load_tokenizer(self.tokenizer),
            count=self.count,
            seed=self.seed,
        )
        print(f"{self.out}: {self.count:,} examples")
        return 0

    def _check(self) -> None:
        """Raises ConfigError for options that do not fit."""
        used = _OPTIONS[self.problem]
        of_others = {name for names in _OPTIONS.values() for name in names} - {*used}
        for entry in dataclasses.fields(self):
            if entry.name in of_others and getattr(self, entry.name) != entry.default:
                raise ConfigError(
                    f"--{entry.name} is not an option of {self.problem}, which has "
                    f"{', '.join(f'--{name}' for name in used)}"
                )
        for name in ("count", "size", "pairs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} is {getattr(self, name)}; use 1 or more")
        if self.seed < 0:
            raise ConfigError(f"--seed is {self.seed}; use 0 or more")
        for name in ("lengths", "positions", "distances", "digits"):
            values = getattr(self, name)
            if not values or (name != "positions" and min(values) < 1):
                raise ConfigError(f"--{name} is {' '.join(map(str, values))}; use 1 or more")
        if self.label_with and len(self.digits) != 1:
            raise ConfigError(
                "--label_with needs one number of digits, such as --digits 17; got "
                f"{' '.join(map(str, self.digits))}"
            )

    def _kinds(self) -> "list[AnyProblem]":
        from megalodon_jax.evaluation.problems import Addition, Copy, Passkey, Recall

        if self.problem == "passkey":
            return [
                Passkey(length=length, position=position)
                for length in self.lengths
                for position in self.positions
            ]
        if self.problem == "copy":
            return [Copy(distance=distance, size=self.size) for distance in self.distances]
        if self.problem == "recall":
            return [Recall(distance=distance, pairs=self.pairs) for distance in self.distances]
        return [Addition(digits=digits) for digits in self.digits]

    def _write_labelled(self) -> str:
        from megalodon_jax.evaluation.examples import write_labelled_additions
        from megalodon_jax.pretrained import load_with_tokenizer

        model, tokenizer = load_with_tokenizer(self.label_with)
        (digits,) = self.digits
        labels = write_labelled_additions(
            self.out, model, tokenizer, digits=digits, count=self.count, seed=self.seed
        )
        return (
            f"{self.out}: {labels.num_written:,} examples labelled by {self.label_with}, "
            f"{labels.num_right:,} of them right; {labels.num_empty:,} prompts without a label"
        )
