"""Accuracy on problems with one right answer."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool

from megalodon_jax.data.tokenizer import Tokenizer
from megalodon_jax.evaluation.problems import (
    KEY_POSITIONS,
    Addition,
    AnyProblem,
    Copy,
    KeyPosition,
    Passkey,
    Problem,
    Recall,
    draw_problems,
)
from megalodon_jax.evaluation.token_scores import TOKENS_PER_CALL, score_batches
from megalodon_jax.generate import generate
from megalodon_jax.language_model import LanguageModel

AnswerMethod = Literal["teacher_forcing", "generation"]

# Quantile of the normal distribution for intervals that hold 95 %.
_Z = 1.959964
# Prompts that are continued side by side.
_GENERATED_ROWS = 16


class AnswerAccuracy(NamedTuple):
    """How many answers of one kind of problem are right.

    Attributes:
      task: "passkey", "copy", "recall" or "addition".
      length: tokens of the prompt, bos included; None where problems differ.
      position: of a passkey; None for other problems.
      digits: of an addition; None for other problems.
      distance: tokens from what has to be recalled to the answer, the same in all problems; None
        for an addition.
      distance_in_chunks: the same in the model's chunks; None also for a model without chunks.
      method: how the answers were found.
      num_problems: number of problems.
      token_accuracy: share of right tokens in all answers.
      exact_match: share of answers of which every token is right.
      low: lower end of the 95 % Wilson interval of `exact_match`.
      high: upper end.
    """

    task: str
    length: int | None
    position: KeyPosition | None
    digits: int | None
    distance: int | None
    distance_in_chunks: float | None
    method: AnswerMethod
    num_problems: int
    token_accuracy: float
    exact_match: float
    low: float
    high: float


def passkey_accuracy(
    model: LanguageModel,
    tokenizer: Tokenizer,
    *,
    lengths: Sequence[int],
    positions: Sequence[KeyPosition] = KEY_POSITIONS,
    count: int = 20,
    seed: int = 0,
    method: AnswerMethod = "teacher_forcing",
    tokens_per_call: int = TOKENS_PER_CALL,
) -> tuple[AnswerAccuracy, ...]:
    """Whether a model recalls a number from a long text, see `Passkey`.

    Args:
      model: the model.
      tokenizer: the tokenizer that the model was trained with.
      lengths: tokens of the prompts.
      positions: of the key.
      count: problems for every length and position.
      seed: of the problems.
      method: see `answer_accuracy`.
      tokens_per_call: tokens that go through the model at a time.

    Returns:
      A result for every length and position, in this order.

    Raises:
      ValueError: an argument is out of range, or a prompt too short for its problem.
      FloatingPointError: the model gave NaN scores (method "generation").
    """
    kinds = [
        Passkey(length=length, position=position) for length in lengths for position in positions
    ]
    return _accuracies(model, tokenizer, kinds, count, seed, method, tokens_per_call)


def copy_accuracy(
    model: LanguageModel,
    tokenizer: Tokenizer,
    *,
    distances: Sequence[int],
    size: int = 16,
    count: int = 100,
    seed: int = 0,
    method: AnswerMethod = "teacher_forcing",
    tokens_per_call: int = TOKENS_PER_CALL,
) -> tuple[AnswerAccuracy, ...]:
    """Whether a model repeats `size` random letters after `distances` tokens, see `Copy`.

    Other arguments, the result and errors as for `passkey_accuracy`.
    """
    kinds = [Copy(distance=distance, size=size) for distance in distances]
    return _accuracies(model, tokenizer, kinds, count, seed, method, tokens_per_call)


def recall_accuracy(
    model: LanguageModel,
    tokenizer: Tokenizer,
    *,
    distances: Sequence[int],
    pairs: int = 8,
    count: int = 100,
    seed: int = 0,
    method: AnswerMethod = "teacher_forcing",
    tokens_per_call: int = TOKENS_PER_CALL,
) -> tuple[AnswerAccuracy, ...]:
    """Whether a model knows the value of one of `pairs` keys after `distances` tokens.

    See `Recall`; other arguments, the result and errors as for `passkey_accuracy`.
    """
    kinds = [Recall(distance=distance, pairs=pairs) for distance in distances]
    return _accuracies(model, tokenizer, kinds, count, seed, method, tokens_per_call)


def addition_accuracy(
    model: LanguageModel,
    tokenizer: Tokenizer,
    *,
    digits: Sequence[int],
    count: int = 1024,
    seed: int = 0,
    method: AnswerMethod = "teacher_forcing",
    tokens_per_call: int = TOKENS_PER_CALL,
) -> tuple[AnswerAccuracy, ...]:
    """Whether a model adds two numbers of `digits` digits, see `Addition`.

    Other arguments, the result and errors as for `passkey_accuracy`.
    """
    kinds = [Addition(digits=each) for each in digits]
    return _accuracies(model, tokenizer, kinds, count, seed, method, tokens_per_call)


def answer_accuracy(
    model: LanguageModel,
    tokenizer: Tokenizer,
    kind: AnyProblem,
    *,
    count: int,
    seed: int = 0,
    method: AnswerMethod = "teacher_forcing",
    tokens_per_call: int = TOKENS_PER_CALL,
) -> AnswerAccuracy:
    """Accuracy on the test problems of one kind.

    Args:
      model: the model.
      tokenizer: the tokenizer that the model was trained with.
      kind: the problem and its size.
      count: number of problems.
      seed: of the problems.
      method: "teacher_forcing" reads prompt and answer, and asks whether every token of the answer
        is the most probable one. If all are, greedy generation writes the same answer:
        `exact_match` is that of generation, at the cost of reading. "generation" continues the
        prompts by the inference engine with temperature 0. After a wrong token, `token_accuracy`
        of the two may differ.
      tokens_per_call: tokens that go through the model at a time ("teacher_forcing").
    """
    if count < 1:
        raise ValueError(f"count is {count}; use 1 or more problems")
    problems = draw_problems(kind, tokenizer, count=count, seed=seed, split="test")
    if method == "generation":
        correct = _generated(model, tokenizer, problems)
    else:
        correct = _teacher_forced(model, tokenizer, problems, tokens_per_call)
    num_exact = sum(bool(each.all()) for each in correct)
    low, high = wilson_interval(num_exact, count)
    lengths = {1 + len(problem.prompt) for problem in problems}
    distance = problems[0].distance or None
    chunk_size = getattr(model.config, "chunk_size", None)
    return AnswerAccuracy(
        task=type(kind).__name__.lower(),
        length=lengths.pop() if len(lengths) == 1 else None,
        position=getattr(kind, "position", None),
        digits=getattr(kind, "digits", None),
        distance=distance,
        distance_in_chunks=distance / chunk_size if distance and chunk_size else None,
        method=method,
        num_problems=count,
        token_accuracy=float(np.concatenate(correct).mean()),
        exact_match=num_exact / count,
        low=low,
        high=high,
    )


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % confidence interval of a probability (Wilson 1927).

    (p + z²/2n ± z √(p(1 - p)/n + z²/4n²)) / (1 + z²/n), with p the observed share of n trials.
    """
    share, z2 = successes / trials, _Z**2
    center = share + z2 / (2 * trials)
    spread = _Z * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    scale = 1 + z2 / trials
    return max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)


def _accuracies(
    model: LanguageModel,
    tokenizer: Tokenizer,
    kinds: Sequence[AnyProblem],
    count: int,
    seed: int,
    method: AnswerMethod,
    tokens_per_call: int,
) -> tuple[AnswerAccuracy, ...]:
    return tuple(
        answer_accuracy(
            model,
            tokenizer,
            kind,
            count=count,
            seed=seed,
            method=method,
            tokens_per_call=tokens_per_call,
        )
        for kind in kinds
    )


def _teacher_forced(
    model: LanguageModel, tokenizer: Tokenizer, problems: Sequence[Problem], tokens_per_call: int
) -> list[Bool[np.ndarray, " m"]]:
    """Whether every token of the answers is the most probable one after the right ones."""
    documents = [
        np.concatenate([[tokenizer.bos_id], problem.prompt, problem.answer]).astype(np.int32)
        for problem in problems
    ]
    correct = [np.zeros(len(problem.answer), bool) for problem in problems]
    # Ids count from 1. The target at position p of a document is its token p + 1, behind bos.
    starts = np.array([0, *(len(problem.prompt) for problem in problems)])
    for batch in score_batches(model, documents, tokens_per_call=tokens_per_call):
        ids, position = np.asarray(batch.segment_ids), np.asarray(batch.position)
        is_answer = (ids != 0) & (position >= starts[ids])
        index = position - starts[ids]
        for where in zip(*np.nonzero(is_answer), strict=True):
            correct[ids[where] - 1][index[where]] = batch.is_greedy[where]
    return correct


def _generated(
    model: LanguageModel, tokenizer: Tokenizer, problems: Sequence[Problem]
) -> list[Bool[np.ndarray, " m"]]:
    """Whether every token of the answers is the one that greedy generation writes there."""
    correct = []
    for first in range(0, len(problems), _GENERATED_ROWS):
        batch = problems[first : first + _GENERATED_ROWS]
        # Every batch has the same number of rows, so that nothing is compiled again.
        rows = [*batch, *[batch[0]] * (_GENERATED_ROWS - len(batch))]
        new = _greedy_continuations(
            model,
            tokenizer,
            [problem.prompt for problem in rows],
            max_tokens=max(len(problem.answer) for problem in rows),
        )
        correct += [
            row[: len(problem.answer)] == problem.answer
            for row, problem in zip(new, batch, strict=False)
        ]
    return correct


def _greedy_continuations(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[np.ndarray],
    *,
    max_tokens: int,
) -> np.ndarray:
    """The most probable continuations of prompts, by the inference engine.

    Args:
      model: the model.
      tokenizer: the model's.
      prompts: token ids without bos.
      max_tokens: tokens to generate.

    Returns:
      int32 (B, max_tokens).
    """
    lengths = np.array([1 + len(prompt) for prompt in prompts], np.int32)
    padded = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: 1 + len(prompt)] = [tokenizer.bos_id, *prompt]
    return generate(
        model,
        padded,
        lengths,
        max_tokens=max_tokens,
        temperature=0.0,
        num_tokens=tokenizer.vocab_size,
    )
