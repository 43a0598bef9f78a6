"""Special tokens added to a tokenizer, and rows added to a model: what was there stays."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

import megalodon_jax
from megalodon_jax.data import ByteTokenizer, load_tokenizer
from megalodon_jax.data.chat_template import ChatTemplate, Message, special_tokens
from megalodon_jax.errors import ConvertError
from megalodon_jax.interop.convert import convert
from megalodon_jax.interop.vocabulary import add_special_tokens, grow_vocabulary
from megalodon_jax.model import Megalodon
from tests.data.test_chat_template import CHATML, write_tokenizer
from tests.fixtures_runs import TINY_MODEL

NEW = ("<|im_start|>", "<|im_end|>")
TOKENS = np.random.default_rng(0).integers(0, 257, (2, 13)).astype(np.int32)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.slow
def test_scores_of_old_tokens_stay(tied):
    model = Megalodon(dataclasses.replace(TINY_MODEL, share_emb=tied), rngs=nnx.Rngs(0))
    grown = grow_vocabulary(model, 260)
    run = nnx.jit(lambda model, tokens: model(tokens).logits)
    want, got = run(model, TOKENS), run(grown, TOKENS)
    assert got.shape == (2, 13, 260)
    np.testing.assert_array_equal(got[..., :257], want)
    # The mean of the columns gives the mean of the scores.
    mean = np.broadcast_to(np.mean(want, axis=-1, keepdims=True), (2, 13, 3))
    np.testing.assert_allclose(got[..., 257:], mean, rtol=1e-5, atol=1e-6)
    table = np.asarray(grown.embed.embedding[...])
    old = np.asarray(model.embed.embedding[...])
    np.testing.assert_array_equal(table[:257], old)
    np.testing.assert_allclose(table[257:], [old.mean(0)] * 3, rtol=1e-6, atol=1e-7)
    # Rows that were never trained become the mean of those that were.
    partly = grow_vocabulary(model, 258, num_trained=100)
    rows = np.asarray(partly.embed.embedding[...])
    assert rows.shape == (258, 8)
    np.testing.assert_allclose(rows[100:], [old[:100].mean(0)] * 158, rtol=1e-6, atol=1e-7)
    with pytest.raises(ConvertError, match="it cannot grow to 200"):
        grow_vocabulary(model, 200)


def test_bytes_with_special_tokens():
    grown, plain = add_special_tokens(ByteTokenizer(), NEW), ByteTokenizer()
    assert grown.vocab_size == 259
    assert special_tokens(grown) == {"<|endoftext|>": 256, NEW[0]: 257, NEW[1]: 258}
    assert (grown.bos_id, grown.eos_id) == (256, 256)
    text = "Grüße <|im_end|> 漢\n"
    np.testing.assert_array_equal(grown.encode(text), plain.encode(text))
    ids = ChatTemplate(CHATML).encode(grown, [Message("user", "a")], add_generation_prompt=False)
    assert ids.tolist() == [256, 257, *b"user\na", 258, *b"\n"]
    assert grown.decode(grown.encode(text)) == text
    for tokens, problem in (
        ((NEW[0], NEW[0]), "given twice"),
        (("",), "empty"),
        (("a",), "already"),
    ):
        with pytest.raises(ConvertError, match=problem):
            add_special_tokens(plain, tokens)


def test_a_tokenizer_file_with_special_tokens(tmp_path):
    path = write_tokenizer(tmp_path, {"chat_template": CHATML})
    plain = load_tokenizer(str(path))
    grown = add_special_tokens(plain, ["<|tool|>"])
    assert grown.vocab_size == plain.vocab_size + 1
    assert special_tokens(grown)["<|tool|>"] == plain.vocab_size
    assert (grown.bos_id, grown.eos_id) == (plain.bos_id, plain.eos_id)
    np.testing.assert_array_equal(grown.encode("a <|tool|>"), plain.encode("a <|tool|>"))
    assert ChatTemplate.of_tokenizer(grown) is not None


@pytest.mark.slow
def test_convert_writes_a_grown_run(trained_run, tmp_path):
    before = megalodon_jax.load(trained_run.run_dir).model
    for target, to in (("run", "run"), ("hf", "huggingface")):
        convert(trained_run.run_dir, tmp_path / target, to=to, special_tokens=NEW)
        model, tokenizer = megalodon_jax.load(tmp_path / target)
        assert tokenizer is not None
        assert tokenizer.vocab_size == model.config.vocab_size == 259
        assert special_tokens(tokenizer)[NEW[1]] == 258
        np.testing.assert_array_equal(model(TOKENS).logits[..., :257], before(TOKENS).logits)
    with pytest.raises(ConvertError, match=r"would keep no tokenizer; give a folder"):
        convert(trained_run.run_dir, tmp_path / "x.safetensors", special_tokens=NEW)
