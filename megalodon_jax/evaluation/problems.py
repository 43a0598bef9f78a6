"""Problems with one right answer: a key in a long text, copies, pairs by distance, addition.

A problem belongs to the training or the test split by a hash of what has to be recalled or added:
no test problem is ever among training examples, whatever the seeds.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Int32

from megalodon_jax.data.tokenizer import Tokenizer

Split = Literal["train", "test"]
KeyPosition = Literal["start", "middle", "end"]
KEY_POSITIONS: tuple[KeyPosition, ...] = get_args(KeyPosition)

# Hashes of test problems, of 256 values: an eighth.
_TEST_HASHES = 32
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Munkhdalai et al. 2024 (arXiv 2404.07143), section 4.3.
_FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)
_PASSKEY_START = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there. "
)


class Problem(NamedTuple):
    """A problem as token ids, without boundary tokens.

    Attributes:
      prompt: what the model reads after bos.
      answer: the only right continuation.
      distance: tokens from the first token to recall to the first one of the answer; 0: nothing in
        the prompt has to be recalled as it is.
    """

    prompt: Int32[np.ndarray, " n"]
    answer: Int32[np.ndarray, " m"]
    distance: int


@dataclass(frozen=True, kw_only=True)
class Passkey:
    """A number in the middle of irrelevant text (Munkhdalai et al. 2024, section 4.3).

    The key has five digits, so that all keys have as many bytes.

    Attributes:
      length: exact number of tokens before the answer, bos included.
      position: where in the text the key is.
    """

    length: int
    position: KeyPosition

    def draw(self, rng: np.random.Generator, tokenizer: Tokenizer, split: Split) -> Problem:
        """A random problem; raises ValueError if `length` is too short."""
        key = _draw(lambda: str(rng.integers(10_000, 50_000)), "passkey", split)
        encode, answer = tokenizer.encode, tokenizer.encode(key)
        start, question = (
            encode(text) for text in (_PASSKEY_START, "What is the pass key? The pass key is ")
        )
        parts = ("The pass key is ", key, ". Remember it. ", key, " is the pass key. ")
        sentence = [encode(part) for part in parts]
        room = self.length - 1 - sum(map(len, (start, *sentence, question)))
        if room < 0:
            raise ValueError(
                f"a passkey prompt of {self.length} tokens is too short; use at least "
                f"{self.length - room}"
            )
        filler = encode(_FILLER)
        share = {"start": 1.0, "middle": 0.5, "end": 0.0}[self.position]
        after = int(room * share) // len(filler) * len(filler)
        texts = (_repeat(filler, room - after), *sentence, _repeat(filler, after), question)
        distance = sum(map(len, (*sentence[3:], question))) + after
        return Problem(np.concatenate([start, *texts]), answer, distance)


@dataclass(frozen=True, kw_only=True)
class Copy:
    """A text of random letters, to be repeated.

    Attributes:
      distance: exact number of tokens from each token to its copy.
      size: letters.
    """

    distance: int
    size: int = 16

    def draw(self, rng: np.random.Generator, tokenizer: Tokenizer, split: Split) -> Problem:
        """A random problem; raises ValueError if `distance` is too short."""
        text = _draw(lambda: _letters(rng, self.size), "copy", split)
        encode, answer = tokenizer.encode, tokenizer.encode(text)
        before, end = encode("The text is "), encode(". ")
        room = self.distance - len(answer) - len(end) - len(before)
        if room < 0:
            raise ValueError(
                f"a copy of {self.size} letters at a distance of {self.distance} tokens is too "
                f"near; use at least {self.distance - room}"
            )
        parts = (before, answer, end, _repeat(encode(_FILLER), room), before)
        return Problem(np.concatenate(parts), answer, self.distance)


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Associative recall: the value of one of several random keys.

    Keys are four letters and values four digits. The queried pair is a random one of the pairs,
    behind which irrelevant text follows.

    Attributes:
      distance: exact number of tokens from the queried value to the answer.
      pairs: number of pairs.
    """

    distance: int
    pairs: int = 8

    def draw(self, rng: np.random.Generator, tokenizer: Tokenizer, split: Split) -> Problem:
        """A random problem; raises ValueError if `distance` is too short."""

        def draw_pair() -> str:
            return f"{_letters(rng, 4)}={rng.integers(1000, 10_000)}"

        queried = _draw(draw_pair, "recall", split)
        others: dict[str, str] = {}
        while len(others) < self.pairs - 1:
            key, value = draw_pair().split("=")
            if key != queried[:4]:
                others[key] = value
        listed = list(others.items())
        index = int(rng.integers(self.pairs))
        listed.insert(index, (queried[:4], queried[5:]))
        encode = tokenizer.encode
        encoded = [[encode(f" {key}="), encode(value), encode(";")] for key, value in listed]
        end, query = encode("\n"), encode(f"Value of {queried[:4]}=")
        room, least = (
            self.distance - sum(len(part) for pair in encoded[i:] for part in pair)
            + len(encoded[i][0]) - len(end) - len(query)
            for i in (index, 0)
        )  # fmt: skip
        if least < 0:
            raise ValueError(
                f"recall among {self.pairs} pairs at a distance of {self.distance} tokens is too "
                f"near; use at least {self.distance - least}"
            )
        parts = [part for pair in encoded for part in pair]
        parts += [end, _repeat(encode(_FILLER), room), query]
        return Problem(np.concatenate(parts), encoded[index][1], self.distance)


@dataclass(frozen=True, kw_only=True)
class Addition:
    """The sum of two numbers, all digits reversed (Lee et al. 2025, arXiv 2502.01612).

    `a+b=` is followed by the sum, padded with zeros to one digit more than a and b have.

    Attributes:
      digits: of a and of b.
    """

    digits: int

    def draw(self, rng: np.random.Generator, tokenizer: Tokenizer, split: Split) -> Problem:
        """A random problem; the distance is not defined."""
        if self.digits < 1:
            raise ValueError(f"digits is {self.digits}; use 1 or more")

        def draw_terms() -> str:
            return "+".join(_number(rng, self.digits) for _ in range(2))

        terms = _draw(draw_terms, "addition", split)
        answer = str(sum(map(int, terms.split("+")))).zfill(self.digits + 1)
        prompt = "+".join(term[::-1] for term in terms.split("+")) + "="
        return Problem(tokenizer.encode(prompt), tokenizer.encode(answer[::-1]), 0)


AnyProblem = Passkey | Copy | Recall | Addition


def draw_problems(
    kind: AnyProblem, tokenizer: Tokenizer, *, count: int, seed: int, split: Split
) -> list[Problem]:
    """Random problems of a kind, the same ones for the same arguments.

    Args:
      kind: the problem and its size.
      tokenizer: the model's.
      count: number of problems; small ones may be drawn several times.
      seed: any number from 0 on.
      split: training or test problems.

    Raises:
      ValueError: the problem does not fit its size.
    """
    return list(itertools.islice(problem_stream(kind, tokenizer, seed=seed, split=split), count))


def problem_stream(
    kind: AnyProblem, tokenizer: Tokenizer, *, seed: int, split: Split
) -> Iterator[Problem]:
    """The problems of `draw_problems`, without end."""
    name = hashlib.sha256(f"{kind!r} {split}".encode()).digest()[:8]
    rng = np.random.default_rng([seed, int.from_bytes(name)])
    while True:
        yield kind.draw(rng, tokenizer, split)


def split_of(task: str, content: str) -> Split:
    """The split of a problem of a task, by what has to be recalled or added."""
    first = hashlib.sha256(f"{task} {content}".encode()).digest()[0]
    return "test" if first < _TEST_HASHES else "train"


def _draw(draw: Callable[[], str], task: str, split: Split) -> str:
    while split_of(task, content := draw()) != split:
        pass
    return content


def _letters(rng: np.random.Generator, count: int) -> str:
    return "".join(_LETTERS[i] for i in rng.integers(len(_LETTERS), size=count))


def _number(rng: np.random.Generator, digits: int) -> str:
    """A number of exactly so many digits; that of one digit may be 0."""
    first = rng.integers(0 if digits == 1 else 1, 10)
    return "".join(map(str, [first, *rng.integers(10, size=digits - 1)]))


def _repeat(ids: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
    """`count` tokens of a repeated text; the first copy loses its beginning."""
    copies = np.tile(np.asarray(ids, np.int32), math.ceil(count / len(ids)))
    return copies[len(copies) - count :]
