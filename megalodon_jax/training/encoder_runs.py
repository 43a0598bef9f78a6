"""Trained encoders: evaluation of a run, classes of files, vectors of documents."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from megalodon_jax.checkpoints import LoadedRun, RunCheckpoints, load_run
from megalodon_jax.config import AnyEncoderConfig, MeshConfig, ProcessesConfig, TrainConfig
from megalodon_jax.data import Tokenizer, open_source
from megalodon_jax.data.labelled import LabelledExample, pack_examples
from megalodon_jax.encoder_model import EncoderModel
from megalodon_jax.errors import CheckpointError, ConfigError, DataError
from megalodon_jax.evaluation.summary import Evaluation, evaluate_sets
from megalodon_jax.storage.location import AnyPath
from megalodon_jax.tasks import Classification, find_task
from megalodon_jax.training.step import make_eval_step
from megalodon_jax.typing import Batch

# Shorter documents are padded to one length: fewer programs.
_SHORTEST_ROW = 256


class EncoderRun(NamedTuple):
    """A trained encoder, its run on one device, and the step of the checkpoint."""

    model: EncoderModel
    config: TrainConfig
    step: int


class Prediction(NamedTuple):
    """The class of one example.

    Attributes:
      name: the file, with `#` and a number if it has several examples.
      label: number of the class of the highest score.
      class_name: its name.
      probabilities: of all classes.
    """

    name: str
    label: int
    class_name: str
    probabilities: np.ndarray


def load_encoder(
    run_dir: str | AnyPath, *, step: int | None = None, best: bool = False
) -> EncoderRun:
    """The encoder of a run directory.

    Args:
      run_dir: the run's directory.
      step: step of the checkpoint; None: the newest readable one.
      best: the checkpoint of the best held-out result instead.

    Raises:
      ConfigError: the run is not that of an encoder, or `step` and `best` are both given.
      CheckpointError: the run has no readable checkpoint, or none with a held-out result.
    """
    if best:
        if step is not None:
            raise ConfigError(f"step {step} and best name two checkpoints; give one of them")
        step = best_step(run_dir)
    run: LoadedRun = load_run(run_dir, step)
    if not isinstance(run.model, EncoderModel):
        raise ConfigError(
            f"{run_dir} has a model of kind {run.config.model.kind!r}, and this needs an encoder"
        )
    config = dataclasses.replace(run.config, mesh=MeshConfig(), processes=ProcessesConfig())
    return EncoderRun(run.model, config, run.step)


def best_step(run_dir: str | AnyPath) -> int:
    """The step of the checkpoint with the best held-out result.

    Raises:
      CheckpointError: no checkpoint of the run has one.
    """
    with RunCheckpoints(run_dir, read_only=True) as checkpoints:
        step = checkpoints.best_step()
    if step is None:
        raise CheckpointError(
            f"no checkpoint of {run_dir} has a held-out result; set eval_every and "
            "checkpoint_every to the same number, or take the newest one"
        )
    return step


def is_encoder_run(run_dir: str | AnyPath) -> bool:
    """Whether a path is the directory of a run of an encoder."""
    if not (Path(str(run_dir)) / "checkpoints").is_dir():
        return False
    with RunCheckpoints(run_dir, read_only=True) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            return False
        config, _ = checkpoints.config_with_own_tokenizer(steps[-1])
    return isinstance(config.model, AnyEncoderConfig)


def evaluate_run(run: EncoderRun, *, max_batches: int | None = None) -> Evaluation:
    """The result of the run's task on all its held-out examples.

    Args:
      run: from `load_encoder`; change `config.examples` for other data.
      max_batches: most batches of a set; None: all.

    Raises:
      DataError: the examples cannot be read.
    """
    from megalodon_jax.checkpoints import load_run_tokenizer

    task = find_task(run.config.task)
    rows = range(run.config.data.batch_size)
    training, heldout = task.open_loaders(
        run.config, load_run_tokenizer(run.config), rows=rows, num_shards=1
    )
    training.close()
    if not heldout:
        raise DataError(
            "the run holds out no examples; set data.heldout_fraction or a held-out set"
        )
    graphdef, params = nnx.split(run.model, nnx.Param)
    step = make_eval_step(graphdef, run.config, task=task)
    return evaluate_sets(
        step,
        params,
        {name: loader.with_bytes() for name, loader in heldout.items()},
        metric=task.metric,
        max_batches=max_batches,
    ).all_sets


def classify_files(run: EncoderRun, paths: Sequence[str | Path]) -> Iterator[Prediction]:
    """The classes of the examples in files, as the run's task reads them.

    Raises:
      ConfigError: the run's task has no classes.
      DataError: a file cannot be read.
    """
    task = find_task(run.config.task)
    if not isinstance(task, Classification):
        raise ConfigError(f"task {run.config.task!r} of the run has no classes")
    names = task.class_names(run.config)

    def examples() -> Iterator[tuple[str, tuple[np.ndarray, ...]]]:
        for path in paths:
            found = task.read_file(Path(path), run.config)
            for number, documents in enumerate(found):
                yield (f"{path}#{number}" if len(found) > 1 else str(path)), documents

    layout = task.layout(run.config)._replace(max_documents=task.documents_per_example)
    graphdef, params = nnx.split(run.model, nnx.Param)

    @jax.jit
    def scores(params: nnx.State, batch: Batch) -> jax.Array:
        found = nnx.merge(graphdef, params)(
            batch.tokens,
            segment_ids=batch.segment_ids,
            max_documents=layout.max_documents,
            aligned=True,
        )
        return jax.nn.softmax(found[:, 0])

    for labels, batch in _batches(examples(), run.config, layout):
        for name, probabilities in zip(labels, np.asarray(scores(params, batch)), strict=False):
            label = int(probabilities.argmax())
            known = names[label] if label < len(names) else str(label)
            yield Prediction(name, label, known, probabilities)


class Vector(NamedTuple):
    """The vector of one document, and the number of its tokens."""

    name: str
    values: np.ndarray
    num_tokens: int


def embed_files(run: EncoderRun, tokenizer: Tokenizer, paths: Sequence[str]) -> Iterator[Vector]:
    """The mean over all tokens of the features of each document: one vector (D,) a document.

    With the head of masked language modeling the features are those after the final norm; with one
    of classes those of its pool. A document is one row, whatever its length; rows are padded to
    lengths of powers of two.

    Args:
      run: an encoder of tokens.
      tokenizer: of the run.
      paths: paths, folders, globs or URLs of texts: plain, .jsonl, .parquet.

    Raises:
      ConfigError: the encoder takes no tokens.
      DataError: a file cannot be read.
    """
    if run.model.config.input != "tokens":
        raise ConfigError("embed takes texts; this encoder takes images or sound")
    text = dataclasses.replace(run.config.data, source="auto", files=tuple(paths), sources=(),
                               heldout_files=(), heldout_sets=(), heldout_fraction=0.0)  # fmt: skip
    documents = open_source(text, "train")
    graphdef, params = nnx.split(run.model, nnx.Param)

    @jax.jit
    def vector(params: nnx.State, tokens: jax.Array, ids: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params).vectors(tokens, segment_ids=ids, aligned=True)[0]

    for document in documents:
        ids = np.concatenate([[tokenizer.bos_id], tokenizer.encode(document.text)]).astype(np.int32)
        length = max(_SHORTEST_ROW, 1 << (len(ids) - 1).bit_length())
        tokens = np.pad(ids, (0, length - len(ids)))[None]
        is_token = (np.arange(length) < len(ids)).astype(np.int32)[None]
        values = np.asarray(vector(params, tokens, is_token))
        yield Vector(document.name, values, len(ids))


def _batches(
    examples: Iterable[tuple[str, tuple[np.ndarray, ...]]], config: TrainConfig, layout
) -> Iterator[tuple[list[str], Batch]]:
    """Names and batches of one example a row; the last batch is filled with padding."""
    size = config.data.batch_size
    names: list[str] = []
    rows: list[LabelledExample] = []
    for name, documents in examples:
        names.append(name)
        rows.append(LabelledExample(documents, 0))
        if len(rows) == size:
            yield names, pack_examples(rows, layout, num_rows=size, seq_len=config.data.seq_len)
            names, rows = [], []
    if rows:
        yield names, pack_examples(rows, layout, num_rows=size, seq_len=config.data.seq_len)
