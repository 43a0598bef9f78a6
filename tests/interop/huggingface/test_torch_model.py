"""The PyTorch model of the Hugging Face form against the JAX model: logits, generation, gradients.

Run with torch and transformers installed; tests/interop/huggingface/test_folder.py needs neither.
"""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from megalodon_jax.config import ModelConfig
from megalodon_jax.data.tokenizer import ByteTokenizer
from megalodon_jax.interop.huggingface import write_huggingface
from megalodon_jax.interop.released import to_state_dict
from megalodon_jax.model import Megalodon
from megalodon_jax.pretrained import load

torch = pytest.importorskip("torch", reason="compares with a PyTorch model")
transformers = pytest.importorskip("transformers", reason="loads the Hugging Face form")

# Two layers with different options: all that ModelConfig allows without ablations.
SIZES = {
    "num_layers": 2, "model_dim": 16, "z_dim": 8, "value_dim": 24, "num_heads": 2,
    "ffn_hidden_dim": 20, "cema_ndim": 3, "chunk_size": 16, "vocab_size": 257,
    "norm_num_groups": 4, "cema_implementation": "reference",
    "timestep_norm_implementation": "reference", "attention_implementation": "reference",
}  # fmt: skip
LAYOUTS = {
    "plain": {},
    "all on": {
        "swiglu": True, "rescale_nffn": True, "scale_emb": True, "share_emb": True,
        "norm_prior_count": 3, "rope_base": 100_000.0, "num_heads": 1,
    },
    "no affine": {"norm_affine": False, "output_size": 200},
}  # fmt: skip
LENGTH = 75  # four chunks of 16 and a part of a fifth


def noisy_model(**options) -> Megalodon:
    """A model whose every parameter, norms and biases included, differs from its initial value."""
    model = Megalodon(ModelConfig(**{**SIZES, **options}), rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model, nnx.Param)
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    noisy = [leaf + 0.1 * rng.normal(size=leaf.shape).astype(leaf.dtype) for leaf in leaves]
    return nnx.merge(graphdef, jax.tree.unflatten(structure, noisy))


class Pair:
    """A model in both libraries, and a batch of tokens with the JAX model's logits."""

    def __init__(self, folder: Path, options: dict):
        self.folder = folder
        self.model = noisy_model(**options)
        write_huggingface(self.model, folder, tokenizer=ByteTokenizer())
        self.torch_model = load_torch(folder)
        self.tokens = np.random.default_rng(2).integers(0, 200, (2, LENGTH)).astype(np.int32)
        self.logits = np.array(self.model(self.tokens).logits)

    @property
    def ids(self):
        return torch.from_numpy(self.tokens).long()


def load_torch(folder: Path, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, **options
    )
    return model.eval()


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """No network, and a cache of this module alone: copies of remote code go there."""
    with pytest.MonkeyPatch.context() as patch:
        modules = str(tmp_path_factory.mktemp("modules"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
        torch.set_num_threads(1)
        yield


@pytest.fixture(scope="module", params=LAYOUTS)
def pair(request, tmp_path_factory) -> Pair:
    folder = tmp_path_factory.mktemp("hf") / "model"
    return Pair(folder, LAYOUTS[request.param])


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Pair:
    return Pair(tmp_path_factory.mktemp("plain") / "model", {})


def error(actual, expected) -> float:
    return float(np.max(np.abs(np.asarray(actual) - np.asarray(expected))))


def test_logits_equal_those_of_jax(pair):
    with torch.no_grad():
        logits = pair.torch_model(pair.ids).logits
    assert logits.dtype == torch.float32
    assert error(logits, pair.logits) < 1e-5


@pytest.mark.parametrize("pieces", [(1,) * 40, (5, 16, 1, 32, 21), (16, 16, 43), (74, 1)])
def test_pieces_equal_the_whole(pair, pieces):
    cache, outputs, at = None, [], 0
    with torch.no_grad():
        for length in pieces:
            out = pair.torch_model(
                pair.ids[:, at : at + length], past_key_values=cache, use_cache=True
            )
            cache, at = out.past_key_values, at + length
            outputs.append(out.logits)
    assert cache is not None
    assert cache.get_seq_length() == at
    assert error(torch.cat(outputs, 1), pair.logits[:, :at]) < 1e-5


def test_the_cache_has_a_constant_size(plain):
    with torch.no_grad():
        sizes = set()
        for length in (1, 20, LENGTH):
            cache = plain.torch_model(plain.ids[:, :length], use_cache=True).past_key_values
            tensors = [leaf for state in cache.layers for leaf in _tensors(state)]
            sizes.add(sum(leaf.numel() for leaf in [*tensors, *_tensors(cache.final_norm)]))
    assert len(sizes) == 1


def _tensors(tree):
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [leaf for branch in tree for leaf in _tensors(branch)]


def test_padding_on_either_side_changes_no_token(plain):
    lengths, pad = (LENGTH, 38), LENGTH
    rows = [plain.tokens[row, :length] for row, length in enumerate(lengths)]
    for side in ("left", "right"):
        ids = np.full((2, pad), 7)
        mask = np.zeros((2, pad), np.int64)
        for row, tokens in enumerate(rows):
            place = slice(pad - len(tokens), pad) if side == "left" else slice(0, len(tokens))
            ids[row, place], mask[row, place] = tokens, 1
        with torch.no_grad():
            out = plain.torch_model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
        assert (out.past_key_values is None) == (side == "right")
        for row, tokens in enumerate(rows):
            valid = out.logits[row][torch.from_numpy(mask[row]).bool()]
            assert error(valid, plain.logits[row, : len(tokens)]) < 1e-5, side
    with pytest.raises(ValueError, match="padded on the right have no cache"):
        plain.torch_model(plain.ids, attention_mask=torch.from_numpy(mask), use_cache=True)
    with pytest.raises(ValueError, match="one run of ones"):
        plain.torch_model(plain.ids, attention_mask=torch.tensor([[1, 0] * 37 + [1]] * 2))


def test_generation_of_padded_rows_equals_that_of_single_rows(plain):
    settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompts = [plain.ids[:1, :21], plain.ids[1:, :13]]
    alone = [plain.torch_model.generate(prompt, **settings)[0, -40:] for prompt in prompts]
    ids = torch.zeros(2, 21, dtype=torch.long)
    mask = torch.zeros(2, 21, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, 21 - prompt.shape[1] :], mask[row, 21 - prompt.shape[1] :] = prompt[0], 1
    together = plain.torch_model.generate(ids, attention_mask=mask, **settings)
    for row in (0, 1):
        assert together[row, -40:].tolist() == alone[row].tolist()
        assert len(set(alone[row].tolist())) > 5


def test_greedy_generation_crosses_three_chunk_borders_with_the_same_tokens(pair):
    from megalodon_jax.generate import generate

    expected = generate(pair.model, pair.tokens[:, :9], max_tokens=50, temperature=0.0)
    settings = {"max_new_tokens": 50, "do_sample": False, "eos_token_id": None}
    found = pair.torch_model.generate(pair.ids[:, :9], pad_token_id=0, **settings)
    assert found[:, 9:].tolist() == expected.tolist()
    uncached = pair.torch_model.generate(
        pair.ids[:, :9], pad_token_id=0, use_cache=False, **settings
    )
    assert uncached.tolist() == found.tolist()


def test_sampling_beams_and_a_continued_cache(plain):
    torch.manual_seed(0)
    sampled = plain.torch_model.generate(
        plain.ids[:, :9], max_new_tokens=30, do_sample=True, top_p=0.9, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    assert sampled.shape == (2, 39)
    beams = {"num_beams": 3, "max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0}
    cached, uncached = (
        plain.torch_model.generate(plain.ids[:, :9], use_cache=use, **beams)
        for use in (True, False)
    )
    assert cached.tolist() == uncached.tolist()
    greedy = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    first = plain.torch_model.generate(
        plain.ids[:, :9], max_new_tokens=12, return_dict_in_generate=True, **greedy
    )
    more = plain.torch_model.generate(
        first.sequences, past_key_values=first.past_key_values, max_new_tokens=12, **greedy
    )
    whole = plain.torch_model.generate(plain.ids[:, :9], max_new_tokens=24, **greedy)
    assert more.tolist() == whole.tolist()


def test_gradients_of_the_loss_equal_those_of_jax(pair):
    tokens = pair.tokens

    def loss(model):
        logits = model(tokens).logits[:, :-1]
        chosen = jax.numpy.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
        return -chosen.mean()

    value, gradient = nnx.value_and_grad(loss)(pair.model)
    graphdef, _ = nnx.split(pair.model, nnx.Param)
    expected = to_state_dict(nnx.merge(graphdef, gradient))
    out = pair.torch_model(pair.ids, labels=pair.ids)
    assert error(out.loss.detach(), value) < 1e-5
    pair.torch_model.zero_grad()
    out.loss.backward()
    names = dict(pair.torch_model.named_parameters())
    assert len(names) > 40
    for name, parameter in names.items():
        found, wanted = parameter.grad.numpy(), expected[name]
        assert np.linalg.norm(found - wanted) <= 1e-4 * np.linalg.norm(wanted) + 1e-9, name
    pair.torch_model.zero_grad()


def test_round_trips_are_exact(pair, tmp_path):
    before = to_state_dict(pair.model)
    pair.torch_model.save_pretrained(tmp_path / "saved", max_shard_size=5_000)
    assert (tmp_path / "saved" / "model.safetensors.index.json").exists()
    for folder in (pair.folder, tmp_path / "saved"):
        model, _ = load(folder)
        after = to_state_dict(model)
        assert after.keys() == before.keys()
        for name, value in before.items():
            np.testing.assert_array_equal(after[name], value, err_msg=name)
    again = load_torch(tmp_path / "saved")
    for name, value in pair.torch_model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_bfloat16_keeps_cema_in_float32(plain):
    model = load_torch(plain.folder, dtype=torch.bfloat16)
    assert model.layers[0].mega.wv.weight.dtype == torch.bfloat16
    assert model.layers[0].mega.cema.alpha.dtype == torch.float32
    with torch.no_grad():
        logits = model(plain.ids).logits
    expected = torch.from_numpy(plain.logits)
    assert float((logits - expected).norm() / expected.norm()) < 3e-2
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    assert model.generate(plain.ids[:, :9], **settings).shape[0] == 2


@pytest.mark.parametrize("mode", ["softmax", "dropkey"])
def test_a_fresh_model_learns_with_dropout(plain, mode):
    config = transformers.AutoConfig.from_pretrained(
        plain.folder, trust_remote_code=True, dropout=0.1, hidden_dropout=0.1,
        attention_dropout=0.2, attention_dropout_mode=mode,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.arange(40).repeat(2, 1) % 7
    losses = []
    for _ in range(30):
        out = model(ids, labels=ids)
        assert out.past_key_values is None
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[0] > 4.5
    assert losses[-1] < 0.6 * losses[0]
    first, second = model(ids).logits, model(ids).logits
    assert not torch.equal(first, second)


def test_what_is_not_supported_is_refused_by_name(plain):
    for argument in ("position_ids", "output_attentions"):
        with pytest.raises(ValueError, match=argument):
            plain.torch_model(plain.ids, **{argument: torch.ones(1)})
    with pytest.raises(ValueError, match="DynamicCache; pass a MegalodonCache"):
        plain.torch_model(plain.ids, past_key_values=transformers.DynamicCache())
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        plain.torch_model.generate(plain.ids, assistant_model=plain.torch_model)


def test_tokenizer_gives_the_ids_of_the_byte_tokenizer(plain):
    tokenizer = transformers.AutoTokenizer.from_pretrained(plain.folder)
    ours = ByteTokenizer()
    for text in ("def f():\n", "\u00e4\u6f22\U0001f600 <|endoftext|>  x", ""):
        ids = tokenizer(text)["input_ids"]
        assert ids == [ours.bos_id, *ours.encode(text).tolist()]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 256)
    batch = tokenizer(["def f", "x"], padding=True, return_tensors="pt")
    assert batch["attention_mask"].tolist() == [[1] * 6, [0] * 4 + [1] * 2]
    texts = plain.torch_model.generate(**batch, max_new_tokens=5, do_sample=False)
    alone = plain.torch_model.generate(
        **tokenizer("x", return_tensors="pt"), max_new_tokens=5, do_sample=False
    )
    assert texts[1, 4:].tolist()[: alone.shape[1]] == alone[0].tolist()


@pytest.mark.parametrize("library", ["tokenizers", "sentencepiece"])
def test_tokenizer_files_give_our_ids(plain, library, text_file, tmp_path):
    from megalodon_jax.data.tokenizer import load_tokenizer
    from megalodon_jax.data.train_tokenizer import train_tokenizer

    suffix = "json" if library == "tokenizers" else "model"
    path = tmp_path / f"tokenizer.{suffix}"
    train_tokenizer(
        (str(text_file),), str(path), vocab_size=280, document_separator="\0", library=library
    )
    ours = load_tokenizer(str(path))
    write_huggingface(plain.model, tmp_path / "hf", tokenizer=ours)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    for text in ("document 3: ab cab c", "\u00e4 <s> </s>  x\n", " a"):
        ids = tokenizer(text)["input_ids"]
        assert ids == [ours.bos_id, *ours.encode(text).tolist()]
        assert tokenizer.decode(ids, skip_special_tokens=True) == ours.decode(ids)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (ours.bos_id, ours.eos_id)
    if library == "sentencepiece":
        # transformers 5.17 saves a class of remote code under a name that it does not load again.
        return
    tokenizer.save_pretrained(tmp_path / "saved")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert again("ab cab")["input_ids"] == tokenizer("ab cab")["input_ids"]
