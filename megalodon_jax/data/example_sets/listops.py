"""ListOps of Long Range Arena: nested operations on digits (Tay et al. 2021; Nangia et al. 2018).

A tree is a digit with probability 0.75 (always at depth 10), else one of MIN, MAX, MED, SM with 2
to 10 trees, each as probable as the other. Trees of more than 500 and fewer than 2,000 tokens are
kept, no two alike. The tokens are operator, arguments, X; MED is the median, truncated; SM the sum
modulo 10.
"""

import json
import os
import random
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megalodon_jax.data.labelled import ExampleSet, LabelledExample
from megalodon_jax.data.sources import digest_of

# Token ids: the end of the document, digits, operators, the end of an operator's arguments.
EOS, FIRST_DIGIT, FIRST_OPERATOR, END = 0, 1, 11, 15
OPERATORS = ("MIN", "MAX", "MED", "SM")
VOCAB_SIZE = 16
MAX_DEPTH, MAX_ARGUMENTS, DIGIT_PROBABILITY = 10, 10, 0.75
SHORTEST, LONGEST = 500, 2_000
# Examples that one process draws from one seed.
_SHARD = 500
_FEW = 1_000


class ListOps(NamedTuple):
    """Trees end to end.

    Attributes:
      tokens: of all trees, eos after each.
      stops: end of every tree in `tokens`.
      labels: values of the trees.
    """

    tokens: np.ndarray
    stops: np.ndarray
    labels: np.ndarray


class ListOpsExamples(ExampleSet):
    """Some of the trees, by number."""

    classes = tuple("0123456789")

    def __init__(self, data: ListOps, numbers: range, name: str):
        self._data, self._numbers, self._name = data, numbers, name

    def __len__(self) -> int:
        return len(self._numbers)

    def name(self, index: int) -> str:
        return f"listops/{self._name}#{index}"

    def example(self, index: int) -> LabelledExample:
        number = self._numbers[index]
        start = int(self._data.stops[number - 1]) if number else 0
        tokens = self._data.tokens[start : self._data.stops[number]]
        return LabelledExample((tokens,), int(self._data.labels[number]))

    def fingerprint(self) -> str:
        first = self.example(0).documents[0].tobytes()
        return digest_of("listops", self._name, len(self), first)


def open_listops(
    *,
    num_train: int,
    num_heldout: int,
    seed: int,
    cache: Path | None,
    bounds: tuple[int, int] = (SHORTEST, LONGEST),
) -> dict[str, ListOpsExamples]:
    """The parts train, valid and test, the same for the same arguments.

    Args:
      num_train: trees of train.
      num_heldout: trees of valid, and of test.
      seed: of the trees.
      cache: directory in which they are kept; None: they are generated.
      bounds: lengths of the trees, both excluded.
    """
    count = num_train + 2 * num_heldout
    data = _cached(count, seed, cache, bounds)
    ends = (num_train, num_train + num_heldout, count)
    ranges = zip(("train", "valid", "test"), (0, *ends[:2]), ends, strict=True)
    return {name: ListOpsExamples(data, range(a, b), name) for name, a, b in ranges}


def _cached(count: int, seed: int, cache: Path | None, bounds: tuple[int, int]) -> ListOps:
    if cache is None:
        return generate_listops(count, seed=seed, bounds=bounds)
    key = digest_of("listops", 1, count, seed, bounds)
    path = cache / f"listops_{count}_{key}.npz"
    if path.exists():
        with np.load(path) as file:
            return ListOps(*(file[name] for name in ListOps._fields))
    data = generate_listops(count, seed=seed, bounds=bounds)
    cache.mkdir(parents=True, exist_ok=True)
    # Written beside it and renamed: another process never reads half of it.
    with tempfile.NamedTemporaryFile(dir=cache, suffix=".npz", delete=False) as file:
        np.savez(file, **data._asdict())
    os.replace(file.name, path)
    return data


def generate_listops(
    count: int, *, seed: int, bounds: tuple[int, int] = (SHORTEST, LONGEST)
) -> ListOps:
    """Draws trees, on all cores if there are many; the result depends on the arguments alone."""
    shards = -(-count // _SHARD)
    jobs = [(min(_SHARD, count), seed, shard, bounds) for shard in range(shards)]
    if count <= _FEW:
        results = [_draw_shard(*job) for job in jobs]
    else:
        # Not a fork: threads of JAX may hold locks.
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
            results = list(pool.map(_draw_shard, *zip(*jobs, strict=True)))
    seen: set[bytes] = set()
    trees: list[tuple[bytes, int]] = []
    extra = shards
    while len(trees) < count:
        if not results:
            results = [_draw_shard(_SHARD, seed, extra, bounds)]
            extra += 1
        for tree in results.pop(0):
            if tree[0] not in seen and len(trees) < count:
                seen.add(tree[0])
                trees.append(tree)
    tokens = np.frombuffer(b"".join(tokens for tokens, _ in trees), np.uint8)
    stops = np.cumsum([len(tokens) for tokens, _ in trees])
    return ListOps(tokens, stops, np.array([label for _, label in trees], np.uint8))


def _draw_shard(
    count: int, seed: int, shard: int, bounds: tuple[int, int]
) -> list[tuple[bytes, int]]:
    """Trees of one seed: their tokens with eos, and their values."""
    rng = random.Random(json.dumps([seed, shard]))
    found: list[tuple[bytes, int]] = []
    while len(found) < count:
        tokens = bytearray()
        label = _draw_tree(rng, 1, tokens, bounds[1])
        if label is not None and bounds[0] < len(tokens) < bounds[1]:
            found.append((bytes([*tokens, EOS]), label))
    return found


def _draw_tree(rng: random.Random, depth: int, tokens: bytearray, longest: int) -> int | None:
    """Adds a tree to `tokens` and returns its value; None when it becomes too long."""
    if depth >= MAX_DEPTH or rng.random() > 1 - DIGIT_PROBABILITY:
        digit = rng.randrange(10)
        tokens.append(FIRST_DIGIT + digit)
        return digit
    operator = rng.randrange(len(OPERATORS))
    tokens.append(FIRST_OPERATOR + operator)
    values = []
    for _ in range(rng.randint(2, MAX_ARGUMENTS)):
        value = _draw_tree(rng, depth + 1, tokens, longest)
        if value is None or len(tokens) >= longest:
            return None
        values.append(value)
    tokens.append(END)
    return apply_operator(OPERATORS[operator], values)


def apply_operator(name: str, values: Sequence[int]) -> int:
    """The value of an operator."""
    if name == "MIN":
        return min(values)
    if name == "MAX":
        return max(values)
    if name == "SM":
        return sum(values) % 10
    ordered, middle = sorted(values), len(values) // 2
    if len(values) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) // 2
