"""Problems are exact, their splits disjoint; known models get the accuracy that they must."""

import numpy as np
import pytest
from flax import nnx

from megalodon_jax.baselines.transformer import Transformer
from megalodon_jax.config import TransformerConfig
from megalodon_jax.data import ByteTokenizer
from megalodon_jax.evaluation import answers as module
from megalodon_jax.evaluation.answers import (
    addition_accuracy,
    answer_accuracy,
    copy_accuracy,
    passkey_accuracy,
    recall_accuracy,
    wilson_interval,
)
from megalodon_jax.evaluation.problems import (
    KEY_POSITIONS,
    Addition,
    Copy,
    Passkey,
    Recall,
    draw_problems,
    split_of,
)
from megalodon_jax.model import Megalodon
from tests.evaluation.known_models import CONFIG, Copier, digits_by_chance, uniform

TOKENIZER = ByteTokenizer()


def text(ids: np.ndarray) -> str:
    return TOKENIZER.decode(ids)


@pytest.mark.parametrize("position", KEY_POSITIONS)
@pytest.mark.parametrize("length", [340, 1024, 5001])
def test_passkey_prompts_have_exact_lengths(length, position):
    for problem in draw_problems(
        Passkey(length=length, position=position), TOKENIZER, count=3, seed=1, split="test"
    ):
        prompt, key = text(problem.prompt), text(problem.answer)
        assert 1 + len(problem.prompt) == length
        assert f"The pass key is {key}. Remember it. {key} is the pass key. " in prompt
        assert prompt.startswith("There is an important info hidden")
        assert prompt.endswith("What is the pass key? The pass key is ")
        assert prompt.rindex(key) + problem.distance == len(prompt)
        before, after = prompt.index(key) - 200, len(prompt) - prompt.rindex(key) - 60
        # Whole copies of the filler stand after the key: up to one copy more before it.
        assert {"start": before < 150, "end": after < 20}.get(position, abs(before - after) < 250)


def test_distances_are_exact():
    for kind in (Copy(distance=301), Recall(distance=299), Recall(distance=600, pairs=3)):
        for problem in draw_problems(kind, TOKENIZER, count=5, seed=0, split="train"):
            prompt, answer = text(problem.prompt), text(problem.answer)
            assert problem.distance == kind.distance
            assert prompt[-kind.distance :].startswith(answer)
            assert prompt.count(answer) == 1
            if isinstance(kind, Recall):
                assert prompt.count("=") == kind.pairs + 1
                assert f" {prompt[-5:]}{answer};" in prompt


def test_sums_are_right_and_reversed():
    for digits in (1, 2, 17, 40):
        for problem in draw_problems(
            Addition(digits=digits), TOKENIZER, count=20, seed=0, split="test"
        ):
            a, b = (int(term[::-1]) for term in text(problem.prompt)[:-1].split("+"))
            assert len(problem.prompt) == 2 * digits + 2
            assert len(problem.answer) == digits + 1
            assert int(text(problem.answer)[::-1]) == a + b


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        (Passkey(length=400, position="middle"), "passkey"),
        (Copy(distance=100), "copy"),
        (Recall(distance=300), "recall"),
        (Addition(digits=2), "addition"),
    ],
)
def test_training_and_test_problems_are_disjoint(kind, task):
    """Whatever the seeds and the size of the problem."""

    def contents(seed: int, split) -> set[str]:
        found = set()
        for problem in draw_problems(kind, TOKENIZER, count=150, seed=seed, split=split):
            prompt, answer = text(problem.prompt), text(problem.answer)
            key = {
                "recall": f"{prompt[-5:-1]}={answer}",
                "addition": "+".join(term[::-1] for term in prompt[:-1].split("+")),
            }.get(task, answer)
            assert split_of(task, key) == split
            found.add(key)
        return found

    train, test = contents(0, "train"), contents(1, "test")
    assert train
    assert test
    assert not train & test
    assert contents(0, "train") == train
    assert contents(2, "train") != train


def test_too_short_problems_are_refused():
    for kind, least in (
        (Passkey(length=100, position="end"), 240),
        (Copy(distance=20), 30),
        (Recall(distance=30), 90),
    ):
        with pytest.raises(ValueError, match="use at least") as error:
            draw_problems(kind, TOKENIZER, count=1, seed=0, split="test")
        number = int(str(error.value).split()[-1])
        assert number >= least
        name = "length" if isinstance(kind, Passkey) else "distance"
        fitting = type(kind)(**{**kind.__dict__, name: number})
        draw_problems(fitting, TOKENIZER, count=9, seed=0, split="test")


def test_a_copying_model_finds_everything():
    model = Copier(memory=512)
    passkeys = passkey_accuracy(model, TOKENIZER, lengths=[400, 480], count=4, tokens_per_call=512)
    copies = copy_accuracy(model, TOKENIZER, distances=[60, 301], count=4, tokens_per_call=512)
    recalls = recall_accuracy(model, TOKENIZER, distances=[200], count=4, tokens_per_call=512)
    assert [(each.length, each.position) for each in passkeys] == [
        (length, position) for length in (400, 480) for position in KEY_POSITIONS
    ]
    assert [each.distance for each in (*copies, *recalls)] == [60, 301, 200]
    assert copies[1].distance_in_chunks == 301 / CONFIG.chunk_size
    for each in (*passkeys, *copies, *recalls):
        assert each.exact_match == each.token_accuracy == 1.0
        assert each.high == pytest.approx(1.0)
        assert 0.5 < each.low < 0.52  # Wilson: 4 / (4 + 1.96^2)


def test_a_short_memory_finds_what_is_near():
    """The copier's memory ends: answers beyond it are lost."""
    near, far = copy_accuracy(
        Copier(memory=100), TOKENIZER, distances=[40, 150], count=3, tokens_per_call=256
    )
    assert near.exact_match == 1.0
    assert far.exact_match == 0.0


def test_a_model_without_memory_is_at_chance():
    (recall,) = recall_accuracy(
        digits_by_chance(), TOKENIZER, distances=[150], count=100, tokens_per_call=4096
    )
    assert 0.06 < recall.token_accuracy < 0.14
    assert recall.exact_match == 0.0
    assert recall.low == 0.0
    (addition,) = addition_accuracy(uniform(), TOKENIZER, digits=[3], count=8)
    assert addition.token_accuracy == 0.0
    assert (addition.digits, addition.distance, addition.length) == (3, None, 9)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["megalodon", "transformer"])
def test_teacher_forcing_agrees_with_generation(kind):
    """Answers written by the model itself are exact by both methods, and others by neither."""
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
    problems = draw_problems(Addition(digits=3), TOKENIZER, count=6, seed=0, split="test")
    written = module._greedy_continuations(
        model, TOKENIZER, [problem.prompt for problem in problems], max_tokens=4
    )
    for row in written[3:]:
        row[2] = (row[2] + 1) % 257
    problems = [
        problem._replace(answer=row) for problem, row in zip(problems, written, strict=True)
    ]
    by_forcing = module._teacher_forced(model, TOKENIZER, problems, 64)
    by_generation = module._generated(model, TOKENIZER, problems)
    expected = [True, True, True, False, False, False]
    assert [bool(each.all()) for each in by_forcing] == expected
    assert [bool(each.all()) for each in by_generation] == expected
    # Up to the first wrong token both have read the same.
    for forced, generated in zip(by_forcing, by_generation, strict=True):
        np.testing.assert_array_equal(forced[:3], generated[:3])


@pytest.mark.slow
def test_generation_is_a_method_of_its_own():
    model = Megalodon(CONFIG, rngs=nnx.Rngs(0))
    kind = Addition(digits=3)
    results = [
        answer_accuracy(model, TOKENIZER, kind, count=5, method=method, tokens_per_call=64)
        for method in ("teacher_forcing", "generation")
    ]
    assert [each.method for each in results] == ["teacher_forcing", "generation"]
    assert results[0].exact_match == results[1].exact_match == 0.0


def test_wilson_intervals():
    # Brown, Cai and DasGupta 2001: center and width by hand for 7 of 20 and for the borders.
    assert wilson_interval(7, 20) == pytest.approx((0.18119, 0.56715), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.16113), abs=1e-4)
    assert wilson_interval(20, 20) == pytest.approx((0.83887, 1.0), abs=1e-4)
    with pytest.raises(ValueError, match="count is 0"):
        answer_accuracy(uniform(), TOKENIZER, Addition(digits=3), count=0)
