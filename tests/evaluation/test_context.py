"""Perplexity by context and loss by position, against whole rows and models that are known."""

import math

import jax
import numpy as np
import pytest
from flax import nnx

from megalodon_jax.baselines.transformer import Transformer
from megalodon_jax.config import TransformerConfig
from megalodon_jax.data import ByteTokenizer
from megalodon_jax.errors import DataError
from megalodon_jax.evaluation.context import loss_by_position, perplexity_by_context
from megalodon_jax.evaluation.variants import with_window
from megalodon_jax.model import Megalodon
from tests.evaluation.known_models import CONFIG, VOCAB_SIZE, bigram, uniform

TEXTS = ["The quick brown fox jumps over the lazy dog. " * 3, "é" * 20, "a"]
BOS = 256
TOKENIZER = ByteTokenizer()
TRANSFORMER = TransformerConfig(
    num_layers=1, model_dim=16, num_heads=2, ffn_hidden_dim=24, vocab_size=VOCAB_SIZE
)


@pytest.fixture(scope="module")
def models() -> dict:
    transformer = Transformer(TRANSFORMER, rngs=nnx.Rngs(0))
    return {
        "megalodon": Megalodon(CONFIG, rngs=nnx.Rngs(0)),
        "transformer": transformer,
        "window": with_window(transformer, 24),
        # Wider than the rows of its cache.
        "wide window": with_window(transformer, 1000),
    }


def targets_of(texts, *, join: bool) -> list[np.ndarray]:
    targets = [np.array([*text.encode(), BOS], np.int32) for text in texts]
    return [np.concatenate(targets)] if join else targets


class WholeRows:
    """Cross-entropy in float64 of blocks, each by one call without a cache."""

    def __init__(self, model):
        graphdef, self.params = nnx.split(model)
        self.call = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens).logits)

    def __call__(self, block: np.ndarray) -> np.ndarray:
        tokens = np.array([[BOS, *block[:-1]]], np.int32)
        # Padding behind the tokens changes nothing before it.
        padded = np.pad(tokens, ((0, 0), (0, 200 - tokens.shape[1])))
        logits = np.asarray(self.call(self.params, padded), np.float64)[0, : len(block)]
        shifted = logits - logits.max(-1, keepdims=True)
        log_z = np.log(np.exp(shifted).sum(-1))
        return log_z - shifted[np.arange(len(block)), block]


@pytest.mark.parametrize("kind", ["megalodon", "transformer", "window", "wide window"])
def test_perplexity_equals_whole_rows(models, kind):
    """Odd blocks, pieces that end inside blocks, blocks longer and shorter than a piece."""
    model, tail = models[kind], 7
    whole = WholeRows(model)
    results = perplexity_by_context(
        model, TOKENIZER, TEXTS, contexts=(19, 50, 0), tail=tail, tokens_per_call=32
    )
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    for result in results:
        losses, tails, blocks = [], [], 0
        for targets in targets_of(TEXTS, join=False):
            size = result.context or len(targets)
            for start in range(0, len(targets), size):
                nats = whole(targets[start : start + size])
                losses.append(nats)
                tails.append(nats[max(0, size - tail) :])
                blocks += 1
        nats, last = np.concatenate(losses), np.concatenate(tails)
        assert (result.num_tokens, result.num_blocks) == (num_bytes + len(TEXTS), blocks)
        assert result.tail_tokens == len(last)
        assert result.loss == pytest.approx(nats.mean(), rel=1e-5)
        assert result.perplexity == pytest.approx(math.exp(nats.mean()), rel=1e-4)
        assert result.tail_loss == pytest.approx(last.mean(), rel=1e-5)
        assert result.bits_per_byte == pytest.approx(nats.sum() / math.log(2) / num_bytes, rel=1e-5)


@pytest.mark.slow
def test_joined_documents_are_one(models):
    whole = WholeRows(models["megalodon"])
    (result,) = perplexity_by_context(
        models["megalodon"], TOKENIZER, TEXTS, contexts=(0,), join=True, tokens_per_call=64
    )
    (targets,) = targets_of(TEXTS, join=True)
    assert result.num_blocks == 1
    assert result.loss == pytest.approx(whole(targets).mean(), rel=1e-5)


def test_loss_by_position_equals_whole_rows(models):
    whole = WholeRows(models["megalodon"])
    results = loss_by_position(models["megalodon"], TOKENIZER, TEXTS, tokens_per_call=32)
    rows = [whole(targets) for targets in targets_of(TEXTS, join=False)]
    assert [result.first for result in results] == [1, 2, 4, 8, 16, 32, 64, 128]
    for result in results:
        expected = np.concatenate([row[result.first - 1 : result.last] for row in rows])
        assert result.num_tokens == len(expected)
        assert result.loss == pytest.approx(expected.mean(), rel=1e-5)


def test_a_uniform_model_has_the_perplexity_of_the_vocabulary():
    for result in perplexity_by_context(uniform(), TOKENIZER, TEXTS, contexts=(8, 0)):
        assert result.perplexity == pytest.approx(VOCAB_SIZE, rel=1e-6)
        assert result.tail_perplexity == pytest.approx(VOCAB_SIZE, rel=1e-6)
    for bucket in loss_by_position(uniform(), TOKENIZER, TEXTS):
        assert bucket.loss == pytest.approx(math.log(VOCAB_SIZE), rel=1e-6)


def test_a_model_without_memory_has_the_same_loss_at_every_context():
    """Only the first token of a block differs: it is predicted from bos."""
    model = bigram()
    table = np.asarray(model.table[...], np.float64)
    losses = np.log(np.exp(table).sum(-1, keepdims=True)) - table
    text = "".join(map(chr, np.random.default_rng(1).integers(97, 123, 300)))
    (targets,) = targets_of([text], join=False)
    results = perplexity_by_context(model, TOKENIZER, [text], contexts=(5, 50, 0), tail=4)
    for result in results:
        before = np.array([BOS, *targets[:-1]])
        before[:: result.context or len(targets)] = BOS
        assert result.loss == pytest.approx(losses[before, targets].mean(), rel=1e-5)
        # The tails of 5 tokens leave out the first one of a block.
        size = result.context or len(targets)
        in_tail = np.arange(len(targets)) % size >= size - 4
        expected = losses[before, targets][in_tail].mean()
        assert result.tail_loss == pytest.approx(expected, rel=1e-5)


def test_only_the_first_tokens_are_read(models):
    model = models["megalodon"]
    (result,) = perplexity_by_context(
        model, TOKENIZER, TEXTS, contexts=(0,), max_tokens=100, tokens_per_call=64
    )
    (first,) = perplexity_by_context(
        model, TOKENIZER, [TEXTS[0]], contexts=(0,), max_tokens=100, tokens_per_call=64
    )
    assert (result.num_tokens, result.num_blocks) == (100, 1)
    assert result.loss == first.loss
    assert result.bits_per_byte == pytest.approx(result.loss / math.log(2), rel=1e-6)


def test_nothing_is_compiled_for_another_context(models):
    """MEGALODON's batches have one shape, whatever the context."""
    from megalodon_jax.evaluation import token_scores as module

    model = models["megalodon"]
    options = {"tokens_per_call": 32, "max_tokens": 150}
    perplexity_by_context(model, TOKENIZER, TEXTS, contexts=(0,), **options)
    count = module._score_step._cache_size()
    perplexity_by_context(model, TOKENIZER, TEXTS, contexts=(8, 24, 77, 0), **options)
    loss_by_position(model, TOKENIZER, TEXTS, **options)
    assert module._score_step._cache_size() == count


def test_a_window_changes_the_loss_of_what_lies_beyond_it(models):
    narrow, wide, full = (
        loss_by_position(models[kind], TOKENIZER, TEXTS, tokens_per_call=32)
        for kind in ("window", "wide window", "transformer")
    )
    assert wide == full
    same = [a.loss == pytest.approx(b.loss, rel=1e-5) for a, b in zip(narrow, full, strict=True)]
    # Positions up to 16 to 31: a part of this bucket sees more than 24 tokens.
    assert same == [True, True, True, True, False, False, False, False]
    with pytest.raises(ValueError, match="a Megalodon has no attention window"):
        with_window(models["megalodon"], 24)


def test_bad_arguments_are_refused():
    with pytest.raises(DataError, match="nothing to evaluate"):
        perplexity_by_context(uniform(), TOKENIZER, [], contexts=(8,))
    with pytest.raises(ValueError, match="contexts are"):
        perplexity_by_context(uniform(), TOKENIZER, TEXTS, contexts=(-1,))
    with pytest.raises(ValueError, match="tail is -1"):
        perplexity_by_context(uniform(), TOKENIZER, TEXTS, contexts=(8,), tail=-1)
