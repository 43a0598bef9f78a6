"""The model card: README.md of a folder, from the model's sizes and the run's own metrics."""

import itertools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from megalodon_jax.config import TrainConfig
from megalodon_jax.errors import ConvertError
from megalodon_jax.file_limits import FileLimitError, read_bytes
from megalodon_jax.model import Megalodon
from megalodon_jax.storage.files import exists
from megalodon_jax.storage.location import AnyPath, as_path

MAX_METRICS_BYTES = 1_000_000_000
METRICS_FILE = "metrics.jsonl"


class HeldoutResult(NamedTuple):
    """A held-out evaluation of a run; its loss is in nats per token."""

    step: int
    loss: float
    bits_per_byte: float | None


class RunFacts(NamedTuple):
    """The facts of a training that a run's files state; None: they do not state it.

    Attributes:
      config: the resolved configuration.
      step: updates of the checkpoint.
      tokens: tokens with a loss in these updates; unknown after a resume, which logs some twice.
      heldout: the last evaluation up to the checkpoint.
    """

    config: TrainConfig
    step: int
    tokens: int | None = None
    heldout: HeldoutResult | None = None


def read_run_facts(run_dir: str | AnyPath, config: TrainConfig, step: int) -> RunFacts:
    """The facts of a run's checkpoint, from `metrics.jsonl` if there is one.

    Raises:
      ConvertError: the file cannot be read, or is not lines of JSON.
    """
    path = as_path(run_dir) / METRICS_FILE
    lines = _read_lines(path) if exists(path) else []
    lines = [line for line in lines if line["step"] <= step]
    heldout = [line for line in lines if isinstance(line.get("heldout_loss"), float)]
    counted = [line for line in lines if isinstance(line.get("tokens"), float)]
    steps = [line["step"] for line in counted]
    is_ascending = all(before < after for before, after in itertools.pairwise(steps))
    is_whole = is_ascending and steps[-1:] == [step]
    return RunFacts(
        config,
        step,
        int(sum(line["tokens"] for line in counted)) if is_whole else None,
        _heldout_result(heldout[-1]) if heldout else None,
    )


def _heldout_result(line: Mapping[str, Any]) -> HeldoutResult:
    bits = line.get("heldout_bits_per_byte")
    return HeldoutResult(
        line["step"], line["heldout_loss"], bits if isinstance(bits, float) else None
    )


def _read_lines(path: AnyPath) -> list[dict[str, Any]]:
    try:
        text = read_bytes(path, max_bytes=MAX_METRICS_BYTES).decode("utf-8")
        lines = [json.loads(line) for line in text.splitlines() if line]
    except (OSError, ValueError, RecursionError, FileLimitError) as error:
        raise ConvertError(f"cannot read the run's metrics in {path}: {error}") from error
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]


def model_card(model: Megalodon, facts: RunFacts | None) -> str:
    """The card as Markdown, with the metadata that the hub reads."""
    config = model.config
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    rows = {
        "parameters": f"{count:,}",
        "layers": f"{config.num_layers}",
        "width": f"{config.model_dim:,}",
        "attention heads": f"{config.num_heads}",
        "tokens of an attention chunk": f"{config.chunk_size:,}",
        "token ids": f"{config.vocab_size:,}",
        "dtype of the parameters": config.param_dtype,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return _CARD.format(table=table, training=_training(facts))


def _training(facts: RunFacts | None) -> str:
    if facts is None:
        return ""
    data, optim = facts.config.data, facts.config.optim
    rows = {
        "updates": f"{facts.step:,}",
        "tokens with a loss": None if facts.tokens is None else f"{facts.tokens:,}",
        "rows of a batch": f"{data.batch_size:,}",
        "tokens of a row": f"{data.seq_len:,}",
        "peak learning rate": f"{optim.lr:g}",
    }
    if facts.heldout is not None:
        at = f" (after update {facts.heldout.step:,})"
        rows["held-out loss, nats per token"] = f"{facts.heldout.loss:.4f}{at}"
        if facts.heldout.bits_per_byte is not None:
            rows["held-out bits per byte"] = f"{facts.heldout.bits_per_byte:.4f}{at}"
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    return "\n## Training\n\n| | |\n|---|---|\n" + "\n".join(lines) + "\n"


_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- megalodon
---

# MEGALODON

A language model with a state of constant size and unlimited context (Ma et al. 2024,
[arXiv 2404.08801](https://arxiv.org/abs/2404.08801)), written by megalodon-flax.

| | |
|---|---|
{table}
{training}
## Use

In PyTorch:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this repository's name, or its folder
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```

In JAX:

```python
import megalodon_jax

model, tokenizer = megalodon_jax.load(".")
print(megalodon_jax.generate_text(model, tokenizer, ["Once upon a time"])[0].text)
```
"""
