"""Tiny models for lm-evaluation-harness, and what full passes in float64 say of them."""

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx

# simple_evaluate is imported on first use.
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from megalodon_jax.baselines.transformer import Transformer
from megalodon_jax.config import TransformerConfig
from megalodon_jax.model import Megalodon
from tests.fixtures_runs import TINY_MODEL

BOS = 256
LONGEST = 192


def build(kind: str):
    """A model whose scores differ clearly, and whose most probable tokens are small letters."""
    if kind == "megalodon":
        built = Megalodon(TINY_MODEL, rngs=nnx.Rngs(0))
    else:
        config = TransformerConfig(
            num_layers=1, model_dim=8, num_heads=2, ffn_hidden_dim=8, vocab_size=257
        )
        built = Transformer(config, rngs=nnx.Rngs(0))
    ids = np.arange(257)
    assert built.output is not None
    built.output.kernel[...] *= np.where((ids >= ord("a")) & (ids <= ord("z")), 5.0, 0.5)
    return built


class FullPasses:
    """Scores of whole sequences from one call of the model each, in float64."""

    def __init__(self, model):
        graphdef, state = nnx.split(model)
        self._call = jax.jit(lambda tokens: nnx.merge(graphdef, state)(tokens).logits)

    def logits(self, tokens: list[int]) -> np.ndarray:
        padded = np.zeros((1, LONGEST), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(self._call(padded), np.float64)[0, : len(tokens)]

    def score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        logits = self.logits([*context, *continuation])[len(context) - 1 : -1]
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total = logprobs[np.arange(len(continuation)), continuation].sum()
        return float(total), bool((logits.argmax(-1) == continuation).all())

    def greedy(self, text: str, count: int) -> list[int]:
        return self.continue_tokens([BOS, *text.encode()], count)

    def continue_tokens(self, prompt: list[int], count: int) -> list[int]:
        tokens, start = list(prompt), len(prompt)
        while len(tokens) < start + count:
            # 256 ends a text.
            tokens.append(int(self.logits(tokens)[-1].argmax()))
            if tokens[-1] == BOS:
                break
        return tokens[start:]


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


def tokens_of(text: str) -> list[int]:
    return list(text.encode())


def write_task(folder: Path, name: str, task: str, examples: Sequence[dict]) -> None:
    """A task of a YAML file, with its examples in a local file."""
    data = folder / f"{name}.jsonl"
    data.write_text("\n".join(map(json.dumps, examples)))
    source = (
        f"dataset_path: json\ntest_split: test\ndataset_kwargs:\n"
        f"  data_files: {{test: {data}}}\n  cache_dir: {folder / 'cache'}\n"
    )
    (folder / f"{name}.yaml").write_text(task + source)


def evaluate(lm, task_dir: Path, tasks: list[str], **settings) -> dict:
    """All that an evaluation gives; the metrics of every task are in `results`."""
    manager = TaskManager(include_path=str(task_dir), include_defaults=False)
    results = simple_evaluate(
        model=lm, tasks=tasks, task_manager=manager, bootstrap_iters=0, **settings
    )
    assert results is not None
    return dict(results)
