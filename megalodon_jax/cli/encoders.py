"""Commands for trained encoders: `megalodon classify`, and `megalodon evaluate` of their runs."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import tyro

from megalodon_jax.cli.command import WithCompilationCache
from megalodon_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Classify(WithCompilationCache):
    """Names the class of files with a trained encoder, a line for each example.

    Example: megalodon classify runs/email mail/*.txt
    """

    run_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """The run_dir of a training run of an encoder."""
    files: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILES")]
    """Files as the run's task reads them: texts; .wav; .npy or IDX files of images; lines of
    ListOps; .jsonl of pairs."""
    step: int | None = None
    """Step of the checkpoint; the newest if not set."""
    best: bool = False
    """Take the checkpoint of the best held-out result."""
    json: bool = False
    """Write lines of JSON with the probabilities of all classes."""

    def run(self) -> int:
        """Prints name, class and probability."""
        from megalodon_jax.training.encoder_runs import classify_files, load_encoder

        if not self.files:
            raise ConfigError("no files to classify; name at least one after the run")
        with self.keep_programs():
            run = load_encoder(self.run_dir, step=self.step, best=self.best)
            for found in classify_files(run, self.files):
                probability = float(found.probabilities[found.label])
                if self.json:
                    line = {
                        "name": found.name,
                        "label": found.label,
                        "class": found.class_name,
                        "probabilities": [round(float(p), 6) for p in found.probabilities],
                    }
                    print(json.dumps(line))
                else:
                    print(f"{found.name}\t{found.class_name}\t{probability:.4f}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Embed(WithCompilationCache):
    """Writes one vector for each document, from a trained encoder of text.

    Example: megalodon embed runs/masked_language "books/*.txt" --output vectors.npy
    """

    run_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """The run_dir of a training run of an encoder, such as masked language modeling."""
    files: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILES")]
    """Paths, folders, globs or URLs of text: plain, .jsonl (both also .gz, .zst), .parquet."""
    output: str
    """New file: .npy, an array (documents, D) in the order of the documents; or .jsonl, lines with
    name, tokens and vector."""
    step: int | None = None
    """Step of the checkpoint; the newest if not set."""
    best: bool = False
    """Take the checkpoint of the best held-out result."""

    def run(self) -> int:
        """Says how many documents were written."""
        import numpy as np

        from megalodon_jax.checkpoints import load_run_tokenizer
        from megalodon_jax.training.encoder_runs import embed_files, load_encoder

        path = Path(self.output)
        if path.suffix not in (".npy", ".jsonl"):
            raise ConfigError(f"output is {self.output!r}; use a name that ends in .npy or .jsonl")
        if path.exists():
            raise ConfigError(f"{path} exists and is not overwritten; give another output")
        with self.keep_programs():
            run = load_encoder(self.run_dir, step=self.step, best=self.best)
            vectors = list(embed_files(run, load_run_tokenizer(run.config), self.files))
        if path.suffix == ".npy":
            np.save(path, np.stack([vector.values for vector in vectors]))
        else:
            lines = (
                {"name": v.name, "tokens": v.num_tokens, "vector": [float(x) for x in v.values]}
                for v in vectors
            )
            path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        print(f"{path}: {len(vectors):,} vectors of {run.model.config.model_dim} numbers")
        return 0


class ExamplesResult(NamedTuple):
    """The result of a run's task on held-out examples.

    Attributes:
      split: held-out part of data with both.
      step: of the checkpoint.
      count: answers.
      accuracy: fraction of right ones.
      loss: mean cross-entropy in nats.
    """

    split: str
    step: int
    count: int
    accuracy: float
    loss: float


def evaluate_encoder(
    run_dir: str,
    *,
    step: int | None,
    best: bool,
    examples_path: str,
    split: Literal["valid", "test"] | None,
    picture: str,
    json_path: str,
) -> str:
    """Evaluates a run of an encoder on its held-out examples; a line about the result.

    Args:
      run_dir: the run.
      step: of the checkpoint; None: the newest.
      best: the checkpoint of the best held-out result.
      examples_path: where the examples are now; empty: where the run has read them.
      split: held-out part of data with both; None: that of the run.
      picture: new SVG file with the confusion matrix; empty: none.
      json_path: new file with the result, an `ExamplesResult`; empty: none.
    """
    from megalodon_jax.evaluation.pictures import confusion_matrix
    from megalodon_jax.evaluation.results import write_results
    from megalodon_jax.tasks import Classification, find_task
    from megalodon_jax.training.encoder_runs import evaluate_run, load_encoder

    run = load_encoder(run_dir, step=step, best=best)
    examples = run.config.examples
    if examples_path:
        examples = dataclasses.replace(examples, path=examples_path)
    if split is not None:
        examples = dataclasses.replace(examples, heldout_split=split)
    run = run._replace(config=dataclasses.replace(run.config, examples=examples))
    result = evaluate_run(run)
    assert result.accuracy is not None
    if picture:
        if result.confusion is None:
            raise ConfigError(f"task {run.config.task!r} has no classes, and no confusion matrix")
        task = find_task(run.config.task)
        names = task.class_names(run.config) if isinstance(task, Classification) else ()
        title = f"{run.config.task}: {result.accuracy:.2%} of {result.num_tokens:,} examples"
        content = confusion_matrix(result.confusion, names, title=title)
        Path(picture).write_text(content, encoding="utf-8")
    if json_path:
        split = examples.heldout_split
        found = ExamplesResult(split, run.step, result.num_tokens, result.accuracy, result.loss)
        options = {"best": best, "examples_path": examples_path, "split": split}
        write_results(
            json_path,
            [found],
            model=run.model,
            task="examples",
            checkpoint=run_dir,
            options=options,
        )
    return f"step {run.step}  {result.describe()}"
