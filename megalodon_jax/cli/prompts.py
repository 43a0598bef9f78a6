"""Prompts of `megalodon generate`: from the command line, standard input and files."""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megalodon_jax.errors import ConfigError, did_you_mean
from megalodon_jax.inference.sampling_params import SamplingParams

STANDARD_INPUT = "-"
_PARAMETERS = {field.name for field in dataclasses.fields(SamplingParams)}
_KEYS = {"id", "prompt", "n", *_PARAMETERS}


class Prompt(NamedTuple):
    """One prompt, and how to continue it.

    Attributes:
      id: identifies it in the output; in a file without ids its line number.
      text: start of the text.
      params: with a seed; sample i draws with seed + i.
      n: samples.
    """

    id: int | str
    text: str
    params: SamplingParams
    n: int


def command_line_prompts(texts: Sequence[str], params: SamplingParams, n: int) -> list[Prompt]:
    """Prompts that are arguments; `-`, or no argument, is the text of standard input.

    One line break at the end of standard input is removed: `echo` and editors add it.
    """
    texts = texts or (STANDARD_INPUT,)
    if texts.count(STANDARD_INPUT) > 1:
        raise ConfigError("standard input (-) is a prompt more than once; give it once")
    texts = [_standard_input() if text == STANDARD_INPUT else text for text in texts]
    prompts = [Prompt(number, text, params, n) for number, text in enumerate(texts, start=1)]
    return _with_seeds(prompts, own_seeds=set())


def read_prompts(path: str, params: SamplingParams, n: int) -> list[Prompt]:
    """Prompts of a file: one a line, or JSON objects a line if its name ends with .jsonl.

    An object has "prompt" and optionally "id", "n" and any sampling parameter. Empty lines are
    skipped.

    Raises:
      ConfigError: the file cannot be read, a line is wrong, or two lines have one id.
    """
    prompts, own_seeds = [], set()
    seen: dict[int | str, int] = {}
    for number, line in _lines(path):
        prompt = Prompt(number, line, params, n)
        if path.endswith(".jsonl"):
            try:
                prompt, has_seed = _parse(line, prompt)
            except ValueError as error:
                raise ConfigError(f"{path} line {number}: {error}") from error
            if has_seed:
                own_seeds.add(prompt.id)
        if prompt.id in seen:
            raise ConfigError(
                f"{path} line {number} has the id {prompt.id!r} of line {seen[prompt.id]}; ids "
                "must differ"
            )
        seen[prompt.id] = number
        prompts.append(prompt)
    if not prompts:
        raise ConfigError(f"{path} has no prompts")
    return _with_seeds(prompts, own_seeds)


def _lines(path: str) -> Iterator[tuple[int, str]]:
    try:
        with Path(path).open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts_file {path} cannot be read: {error}") from error


def _parse(line: str, default: Prompt) -> tuple[Prompt, bool]:
    """The prompt of a JSON object, and whether it has a seed of its own."""
    try:
        fields: Any = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
        raise ValueError('use an object with "prompt", a text')
    for key in fields.keys() - _KEYS:
        raise ValueError(f"unknown key {key!r}{did_you_mean(key, _KEYS)}")
    identity, n = fields.get("id", default.id), fields.get("n", default.n)
    if not isinstance(identity, int | str) or isinstance(identity, bool):
        raise ValueError(f"id is {identity!r}; use a text or an integer")
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ValueError(f"n is {n!r}; use an integer of 1 or more")
    given = {key: value for key, value in fields.items() if key in _PARAMETERS}
    if isinstance(bias := given.get("logit_bias"), dict):
        # Keys of a JSON object are texts.
        given["logit_bias"] = {_integer(key): value for key, value in bias.items()}
    try:
        params = dataclasses.replace(default.params, **given)
    except TypeError as error:
        raise ValueError(f"a parameter has a wrong type: {error}") from error
    return Prompt(identity, fields["prompt"], params, n), given.get("seed") is not None


def _integer(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _with_seeds(prompts: list[Prompt], own_seeds: set[int | str]) -> list[Prompt]:
    """Seeds that follow from the place in the input: a continued output draws the same."""
    seeded, count = [], 0
    for prompt in prompts:
        if prompt.id not in own_seeds:
            seed = ((prompt.params.seed or 0) + count) % 2**64
            prompt = prompt._replace(params=dataclasses.replace(prompt.params, seed=seed))
        seeded.append(prompt)
        count += prompt.n
    return seeded


def _standard_input() -> str:
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input is not UTF-8: {error}") from error
    return text.removesuffix("\n")
