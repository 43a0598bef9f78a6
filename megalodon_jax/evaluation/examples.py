"""Training examples of problems with one right answer, for `task = "sft"`."""

import itertools
import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp

from megalodon_jax.data.tokenizer import Tokenizer
from megalodon_jax.errors import DataError
from megalodon_jax.evaluation.problems import (
    Addition,
    AnyProblem,
    Problem,
    draw_problems,
    problem_stream,
)
from megalodon_jax.generate import max_length
from megalodon_jax.inference.decoders import decode, prepare_decoding
from megalodon_jax.language_model import LanguageModel
from megalodon_jax.storage.location import AnyPath, as_path
from megalodon_jax.typing import Array, Bool, Int32

# Prompts that a model labels side by side.
_LABELLED_ROWS = 1024


class Labels(NamedTuple):
    """Answers of a model to the prompts of its next round.

    Attributes:
      num_written: examples in the file.
      num_empty: prompts after which the model wrote nothing, which are left out.
      num_right: labels that are the right answer. A round does not use this number: it is known
        only because sums can be computed.
    """

    num_written: int
    num_empty: int
    num_right: int


def write_examples(
    path: str | AnyPath,
    kinds: Sequence[AnyProblem],
    tokenizer: Tokenizer,
    *,
    count: int,
    seed: int = 0,
) -> None:
    """Writes training problems as a new .jsonl file of prompts and responses.

    The kinds take turns, from the first line on. The same arguments give the same file. None of the
    problems is one of those by which `answer_accuracy` tests, whatever the seeds. Lengths and
    distances in tokens are exact for a tokenizer whose tokens do not depend on their neighbours,
    such as bytes; others may join tokens at the borders of a problem's parts.

    Args:
      path: a new file.
      kinds: the problems and their sizes.
      tokenizer: the model's, which counts lengths and distances.
      count: number of lines.
      seed: of the problems.

    Raises:
      DataError: the file exists.
      ValueError: an argument is out of range, or a problem does not fit its size.
    """
    if not kinds or count < 1:
        raise ValueError(f"{len(kinds)} kinds of problems and a count of {count}; both need 1")
    streams = itertools.cycle(
        [problem_stream(kind, tokenizer, seed=seed, split="train") for kind in kinds]
    )
    problems = (next(next(streams)) for _ in range(count))
    _write_lines(
        path,
        (
            (tokenizer.decode(problem.prompt), tokenizer.decode(problem.answer))
            for problem in problems
        ),
    )


def write_labelled_additions(
    path: str | AnyPath,
    model: LanguageModel,
    tokenizer: Tokenizer,
    *,
    digits: int,
    count: int,
    seed: int = 0,
) -> Labels:
    """Writes additions whose answers the model gives itself, for a round of self-improvement.

    The model continues training prompts of `digits` digits greedily, up to eos (Lee et al. 2025,
    arXiv 2502.01612). Its answers are written as they are: there is no filter by length and no vote
    of several models.

    Args:
      path: a new .jsonl file.
      model: the model that has been trained on shorter numbers.
      tokenizer: its tokenizer.
      digits: of the numbers.
      count: number of prompts.
      seed: of the problems.

    Raises:
      DataError: the file exists.
      ValueError: an argument is out of range.
      FloatingPointError: the model gave NaN scores.
    """
    if count < 1:
        raise ValueError(f"count is {count}; use 1 or more")
    problems = draw_problems(
        Addition(digits=digits), tokenizer, count=count, seed=seed, split="train"
    )
    num_empty = num_right = 0

    def labelled() -> Iterator[tuple[str, str]]:
        nonlocal num_empty, num_right
        for first in range(0, count, _LABELLED_ROWS):
            batch = problems[first : first + _LABELLED_ROWS]
            for problem, label in zip(batch, _labels(model, tokenizer, batch), strict=True):
                num_empty += not label
                num_right += label == tokenizer.decode(problem.answer)
                if label:
                    yield tokenizer.decode(problem.prompt), label

    num_written = _write_lines(path, labelled())
    return Labels(num_written, num_empty, num_right)


def _labels(
    model: LanguageModel, tokenizer: Tokenizer, problems: Sequence[Problem]
) -> Iterator[str]:
    """The model's own answers to additions of one size, whose prompts have one length."""
    prompts = np.array([[tokenizer.bos_id, *problem.prompt] for problem in problems], np.int32)
    # Every batch has the same number of rows, so that nothing is compiled again.
    rows = np.resize(prompts, (_LABELLED_ROWS, prompts.shape[1]))
    # One token more than an answer: a label that is too long shows.
    num_new = max(len(problem.answer) for problem in problems) + 1
    graphdef, params = nnx.split(model)
    room = max_length(model, rows.shape[1] + num_new)
    new, is_finite = jax.device_get(
        _continue_greedily(graphdef, params, rows, num_new, tokenizer.vocab_size, room)
    )
    if not is_finite:
        raise FloatingPointError("the model gave NaN scores; it cannot label examples")
    for row in new[: len(problems)].tolist():
        yield tokenizer.decode(list(itertools.takewhile(lambda id: id != tokenizer.eos_id, row)))


@partial(jax.jit, static_argnums=(0, 3, 4, 5))
def _continue_greedily(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    prompts: Int32[Array, "B P"],
    num_new: int,
    num_tokens: int,
    room: int | None,
) -> tuple[Int32[Array, "B T"], Bool[Array, ""]]:
    """`num_new` most probable tokens after prompts of one length, and whether no score was NaN.

    One program for a batch: the engine would spend more time on the host with each of thousands of
    short requests than the device with its tokens.
    """
    model: LanguageModel = nnx.merge(graphdef, params)
    B = prompts.shape[0]
    hidden, cache = model.hidden(prompts, cache=model.init_cache(B, max_length=room))
    weights = prepare_decoding(model)

    def step(carry: tuple[Array, Any], _: None) -> tuple[tuple[Array, Any], tuple[Array, Array]]:
        logits, cache = carry
        token = jnp.argmax(logits[:, :num_tokens], axis=-1).astype(jnp.int32)
        is_nan = jnp.isnan(logits).any()
        logits, cache = decode(weights, cache, token, jnp.ones(B, bool))
        return (logits, cache), (token, is_nan)

    start = (model.logits(hidden[:, -1]), cache)
    _, (tokens, is_nan) = jax.lax.scan(step, start, length=num_new)
    return tokens.T, ~is_nan.any()


def _write_lines(path: str | AnyPath, pairs: Iterator[tuple[str, str]]) -> int:
    """Writes a new file; returns the number of lines."""
    target = as_path(path)
    if target.exists():
        raise DataError(f"{path} exists and is not overwritten; give another path")
    count = 0
    try:
        with target.open("w") as file:
            for prompt, response in pairs:
                file.write(json.dumps({"prompt": prompt, "response": response}) + "\n")
                count += 1
    except BaseException:
        target.unlink()
        raise
    return count
