"""Files of training examples: deterministic, read by the trainer, labelled by the model itself."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from megalodon_jax.baselines.transformer import Transformer
from megalodon_jax.config import TransformerConfig
from megalodon_jax.data import ByteTokenizer
from megalodon_jax.data.examples import encode_example
from megalodon_jax.errors import DataError
from megalodon_jax.evaluation.examples import write_examples, write_labelled_additions
from megalodon_jax.evaluation.problems import Addition, Copy, Passkey, Recall, draw_problems
from megalodon_jax.model import Megalodon
from tests.evaluation.known_models import CONFIG

TOKENIZER = ByteTokenizer()
KINDS = (
    Passkey(length=400, position="end"), Copy(distance=80), Recall(distance=200),
    Addition(digits=3),
)  # fmt: skip


def read(path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_files_are_deterministic_and_have_the_kinds_in_turn(tmp_path):
    first, second, other = (tmp_path / name for name in "abc")
    write_examples(first, KINDS, TOKENIZER, count=10, seed=3)
    write_examples(second, KINDS, TOKENIZER, count=10, seed=3)
    write_examples(other, KINDS, TOKENIZER, count=10, seed=4)
    assert first.read_bytes() == second.read_bytes() != other.read_bytes()
    records = read(first)
    assert len(records) == 10
    starts = ("There is an important", "The text is", " ")
    for index, record in enumerate(records):
        kind = index % 4
        assert record["prompt"].startswith(starts[kind]) if kind < 3 else "+" in record["prompt"]
    with pytest.raises(DataError, match="exists and is not overwritten"):
        write_examples(first, KINDS, TOKENIZER, count=10)
    with pytest.raises(ValueError, match="both need 1"):
        write_examples(tmp_path / "d", (), TOKENIZER, count=10)


def test_the_trainer_reads_what_the_evaluation_reads(tmp_path):
    """As tokens an example is bos, a problem's prompt, its answer and eos."""
    write_examples(tmp_path / "a.jsonl", KINDS[:1], TOKENIZER, count=3, seed=5)
    problems = draw_problems(KINDS[0], TOKENIZER, count=3, seed=5, split="train")
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    for line, problem in zip(lines, problems, strict=True):
        example = encode_example(line, TOKENIZER, None)
        expected = [256, *problem.prompt, *problem.answer, 256]
        assert example.stream.tolist() == expected
        assert example.is_response.sum() == len(problem.answer) + 1


@pytest.mark.parametrize("kind", ["megalodon", "transformer"])
def test_a_round_of_self_improvement_reads_what_it_wrote(kind, tmp_path):
    """Labels are the model's greedy continuations, found here by whole rows without a cache."""
    model = (
        Megalodon(CONFIG, rngs=nnx.Rngs(0))
        if kind == "megalodon"
        else Transformer(
            TransformerConfig(
                num_layers=1, model_dim=16, num_heads=2, ffn_hidden_dim=24, vocab_size=257
            ),
            rngs=nnx.Rngs(0),
        )
    )
    path = tmp_path / "round.jsonl"
    labels = write_labelled_additions(path, model, TOKENIZER, digits=2, count=5, seed=1)
    problems = draw_problems(Addition(digits=2), TOKENIZER, count=5, seed=1, split="train")
    graphdef, params = nnx.split(model)
    call = jax.jit(lambda tokens: nnx.merge(graphdef, params)(tokens).logits)
    expected = []
    for problem in problems:
        row = np.zeros((1, 11), np.int32)
        row[0, :7] = [256, *problem.prompt]
        for column in range(7, 11):
            row[0, column] = np.asarray(call(row))[0, column - 1].argmax()
        new = row[0, 7:].tolist()
        written = TOKENIZER.decode(new[: new.index(256)] if 256 in new else new)
        expected.append((TOKENIZER.decode(problem.prompt), written))
    records = [(each["prompt"], each["response"]) for each in read(path)]
    assert records == [pair for pair in expected if pair[1]]
    assert labels.num_written == len(records)
    assert labels.num_written + labels.num_empty == 5
    assert labels.num_right == 0
    for line in path.read_text().splitlines():
        assert encode_example(line, TOKENIZER, None).is_response.any()


@pytest.mark.slow
def test_models_with_nan_scores_label_nothing(tmp_path):
    model = Megalodon(CONFIG, rngs=nnx.Rngs(0))
    model.embed.embedding[...] = np.nan * model.embed.embedding[...]
    with pytest.raises(FloatingPointError, match="NaN"):
        write_labelled_additions(tmp_path / "a", model, TOKENIZER, digits=2, count=5)
    assert not (tmp_path / "a").exists()
