"""Constrained decoding: llguidance gives the masks of `Request.logits_mask`."""

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from megalodon_jax.config import ModelConfig
from megalodon_jax.data import load_tokenizer
from megalodon_jax.generate import text_request
from megalodon_jax.inference.engine import Engine
from megalodon_jax.inference.requests import Request
from megalodon_jax.inference.sampling import SamplingParams
from tests.data.tokenizer_files import save_json_tokenizer
from tests.model.conftest import perturbed

llguidance = pytest.importorskip("llguidance", reason="needs the extra 'dev'")

# More ids than the tokenizer's 320: those are never drawn.
CONFIG = ModelConfig(
    num_layers=1, model_dim=8, z_dim=4, value_dim=8, num_heads=1, ffn_hidden_dim=8, cema_ndim=2,
    chunk_size=8, vocab_size=333, norm_num_groups=2,
)  # fmt: skip
SCHEMA = {
    "type": "object",
    "properties": {"fast": {"type": "boolean"}, "kind": {"enum": ["a", "bc"]}},
    "required": ["fast", "kind"],
    "additionalProperties": False,
}


class Mask:
    """Tokens that a grammar allows next."""

    def __init__(self, tokenizer: Any, grammar: str):
        self._matcher = llguidance.LLMatcher(tokenizer, grammar)
        self._num_consumed = 0

    def __call__(self, tokens: Sequence[int]) -> np.ndarray:
        self._matcher.consume_tokens(tokens[self._num_consumed :])
        self._num_consumed = len(tokens)
        assert not self._matcher.is_error(), self._matcher.get_error()
        return np.frombuffer(self._matcher.compute_bitmask(), np.int32)


@pytest.mark.slow
def test_a_grammar_limits_the_text(tmp_path):
    path = save_json_tokenizer(tmp_path / "tokenizer.json", ["<s>", "</s>"])
    tokenizer = load_tokenizer(str(path))
    known = llguidance.LLTokenizer(path.read_text(), eos_token=tokenizer.eos_id)
    regex = r"[a-c]{2,5}-\d\d;"
    grammars = (
        llguidance.LLMatcher.grammar_from_regex(regex),
        llguidance.LLMatcher.grammar_from_json_schema(json.dumps(SCHEMA)),
    )
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=80)
    plain = text_request(tokenizer, "abc", params)
    engine = Engine(perturbed(CONFIG), slots=4, tokenizer=tokenizer, fixed_bucket=True)
    alone = engine.submit(plain).result()
    limited = [
        engine.submit(
            Request(prompt=plain.prompt, params=plain.params, logits_mask=Mask(known, grammar))
        )
        for grammar in grammars
    ]
    beside = engine.submit(plain)
    engine.run()
    assert [stream.finish_reason for stream in limited] == ["stop", "stop"]
    assert re.fullmatch(regex, limited[0].text)
    parsed = json.loads(limited[1].text)
    assert parsed.keys() == {"fast", "kind"}
    assert parsed["kind"] in ("a", "bc")
    # A neighbour without a mask has the tokens that it has alone.
    assert beside.tokens == alone
