"""Output of `megalodon generate` for several prompts: a line of JSON each, in a file resumable."""

import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalodon_jax.cli.prompts import Prompt
from megalodon_jax.errors import ConfigError

if TYPE_CHECKING:
    from megalodon_jax.generate import Completion


class Completions:
    """Writes completions as they come.

    Attributes:
      remaining: prompts that the file does not have.

    Args:
      path: file to append to; empty: standard output.
      prompts: all prompts.

    Raises:
      ConfigError: the file has something else, or the same ids with other prompts.
    """

    def __init__(self, path: str, prompts: Iterable[Prompt]):
        self._path = Path(path) if path else None
        finished: dict[Any, str] = {}
        if self._path is not None:
            finished = _read_finished(self._path)
            # A file that cannot be written is an error before anything is computed.
            with self._path.open("ab"):
                pass
        self.remaining: list[Prompt] = []
        for prompt in prompts:
            if prompt.id not in finished:
                self.remaining.append(prompt)
            elif finished[prompt.id] != prompt.text:
                raise ConfigError(
                    f"{path} has another prompt with the id {prompt.id!r}; name a new --output"
                )

    def write(self, prompt: Prompt, samples: "Sequence[Completion]") -> None:
        """Writes the line of a prompt."""
        record = {
            "id": prompt.id,
            "prompt": prompt.text,
            "samples": [_sample(each, prompt.params.logprobs is not None) for each in samples],
        }
        text = json.dumps(record, ensure_ascii=False, allow_nan=False)
        # A lone surrogate is not UTF-8; its escape is JSON.
        line = text.encode("utf-8", "backslashreplace")
        if self._path is None:
            print(line.decode(), flush=True)
            return
        with self._path.open("ab") as file:
            file.write(line + b"\n")


def _sample(completion: "Completion", has_logprobs: bool) -> dict[str, Any]:
    sample: dict[str, Any] = {
        "text": completion.text,
        "num_tokens": len(completion.tokens),
        "finish_reason": completion.finish_reason,
    }
    if has_logprobs:
        sample["logprobs"] = [
            {
                "token": token,
                "logprob": _finite(entry.token),
                "top": [[other, _finite(logprob)] for other, logprob in entry.top],
            }
            for token, entry in zip(completion.tokens, completion.logprobs, strict=True)
        ]
    return sample


def _finite(number: float) -> float | None:
    """JSON has no infinities: the logarithm of a probability that is 0 in float32 is null."""
    return number if math.isfinite(number) else None


def _read_finished(path: Path) -> dict[Any, str]:
    """Prompts by id of a file's lines; removes an incomplete last line."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    size = content.rfind(b"\n") + 1
    finished = {}
    for number, line in enumerate(content[:size].splitlines(), start=1):
        try:
            record = json.loads(line)
            finished[record["id"]] = record["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} line {number} is no output of `megalodon generate`; name a new --output"
            ) from error
    if size < len(content):
        print(f"{path}: the last line was incomplete and is written again", file=sys.stderr)
        os.truncate(path, size)
    return finished
