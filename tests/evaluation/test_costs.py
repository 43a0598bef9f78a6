"""The cost of prefill by length, and loss and time without the last attention sub-layers."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from megalodon_jax.baselines.transformer import Transformer
from megalodon_jax.config import TransformerConfig
from megalodon_jax.data import ByteTokenizer
from megalodon_jax.errors import ConfigError
from megalodon_jax.evaluation.context import perplexity_by_context
from megalodon_jax.evaluation.costs import decode_seconds, prefill_cost
from megalodon_jax.evaluation.results import as_json_values, results_table
from megalodon_jax.evaluation.skipping import skip_attention
from megalodon_jax.model import Megalodon
from tests.evaluation.known_models import CONFIG

TWO_LAYERS = dataclasses.replace(CONFIG, num_layers=2)
TRANSFORMER = TransformerConfig(
    num_layers=1, model_dim=16, num_heads=2, ffn_hidden_dim=24, vocab_size=257
)


@pytest.mark.slow
def test_the_cache_of_megalodon_is_of_one_size_and_that_of_a_transformer_grows():
    model = Megalodon(CONFIG, rngs=nnx.Rngs(0))
    shown = []
    costs = prefill_cost(model, lengths=[300, 33, 128], rows=2, repeats=1, on_result=shown.append)
    assert tuple(shown) == costs
    assert [cost.length for cost in costs] == [33, 128, 300]
    for cost in costs:
        assert cost.seconds is not None
        assert cost.tokens_per_second == pytest.approx(2 * cost.length / cost.seconds)
        assert cost.reason is None
    # Keys and values of a chunk, CEMA's states, moments of two norms, position and segment.
    numbers = 16 * (4 + 8) + 2 * 2 * 8 + 2 * (1 + 2 + 2) + 2
    assert {cost.cache_bytes for cost in costs} == {2 * 4 * numbers}
    # The two longer prompts run the same program.
    assert costs[1].program_peak_bytes == costs[2].program_peak_bytes
    parameters = sum(leaf.size * 4 for leaf in _leaves(model))
    assert costs[1].program_peak_bytes is not None
    assert costs[1].program_peak_bytes > parameters

    short, long = prefill_cost(Transformer(TRANSFORMER, rngs=nnx.Rngs(0)), lengths=[200, 500])
    keys_and_values = 2 * 16 * 4 * 256
    assert short.cache_bytes == keys_and_values + 8
    assert long.cache_bytes == 2 * keys_and_values + 8
    assert short.program_peak_bytes is not None
    assert long.program_peak_bytes is not None
    assert long.program_peak_bytes > short.program_peak_bytes


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="use 1 or more"):
        prefill_cost(Megalodon(CONFIG, rngs=nnx.Rngs(0)), lengths=[0])


@pytest.mark.slow
def test_every_number_of_skipped_layers_has_its_loss_and_time():
    model, tokenizer = Megalodon(TWO_LAYERS, rngs=nnx.Rngs(0)), ByteTokenizer()
    texts = ["The quick brown fox jumps over the lazy dog."]
    results = skip_attention(model, tokenizer, texts, skips=(0, 2), repeats=1, tokens_per_call=64)
    (whole,) = perplexity_by_context(model, tokenizer, texts, contexts=(0,), tokens_per_call=64)
    assert [result.skipped for result in results] == [0, 2]
    assert results[0].loss == whole.loss
    assert results[1].loss != whole.loss
    assert all(result.decode_milliseconds > 0 for result in results)
    with pytest.raises(ConfigError, match="skip_attention is 3"):
        skip_attention(model, tokenizer, texts, skips=(0, 3))


def test_a_transformer_decodes_too():
    assert decode_seconds(Transformer(TRANSFORMER, rngs=nnx.Rngs(0)), rows=2, repeats=1) > 0


def test_tables_and_json_leave_out_what_is_not_known():
    (cost,) = prefill_cost(Megalodon(CONFIG, rngs=nnx.Rngs(0)), lengths=[10], repeats=1)
    header, row = results_table([cost, cost._replace(seconds=np.nan)]).splitlines()[:2]
    assert "reason" not in header
    assert header.split()[:3] == ["length", "rows", "seconds"]
    assert row.split()[:2] == ["10", "1"]
    assert as_json_values(cost._replace(seconds=float("nan")))["seconds"] is None


def _leaves(model):
    import jax

    return jax.tree.leaves(nnx.state(model, nnx.Param))
