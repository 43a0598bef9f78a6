"""PEFT itself loads the written adapter onto the PyTorch model: the logits of JAX, merged or not.

Run with torch, transformers and peft installed; tests/training/test_lora.py needs none of them.
"""

import jax
import numpy as np
import pytest
from flax import nnx

from megalodon_jax.config import LoraConfig, ModelConfig
from megalodon_jax.data.tokenizer import ByteTokenizer
from megalodon_jax.interop.huggingface import write_huggingface
from megalodon_jax.interop.huggingface.peft import write_peft_adapter
from megalodon_jax.lora import add_lora
from megalodon_jax.model import Megalodon

torch = pytest.importorskip("torch", reason="PEFT adapts a PyTorch model")
transformers = pytest.importorskip("transformers", reason="loads the Hugging Face form")
peft = pytest.importorskip("peft", reason="loads the adapter")

CONFIG = ModelConfig(
    num_layers=2, model_dim=16, z_dim=8, value_dim=24, num_heads=2, ffn_hidden_dim=20, cema_ndim=3,
    chunk_size=16, vocab_size=257, norm_num_groups=4, implementation="reference",
)  # fmt: skip


@pytest.mark.parametrize("targets", [("*",), ("*.mega.wz.*", "*.nffn.fc2.*")])
def test_peft_loads_the_adapter(targets, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    model = Megalodon(CONFIG, rngs=nnx.Rngs(0))
    write_huggingface(model, tmp_path / "base", tokenizer=ByteTokenizer())
    tokens = np.random.default_rng(2).integers(0, 200, (2, 40)).astype(np.int32)
    base_logits = np.array(model(tokens).logits)
    lora = LoraConfig(rank=3, alpha=5.0, targets=targets)
    add_lora(model, lora, rngs=nnx.Rngs(1))
    rng = np.random.default_rng(3)
    factors = nnx.state(model, nnx.LoRAParam)
    noisy = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), factors)
    nnx.update(model, noisy)
    write_peft_adapter(model, tmp_path / "adapter", lora=lora, base=str(tmp_path / "base"))
    expected = np.array(model(tokens).logits)
    assert np.abs(expected - base_logits).max() > 0.1

    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", trust_remote_code=True
    )
    adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    ids = torch.from_numpy(tokens).long()
    with torch.no_grad():
        np.testing.assert_allclose(adapted(ids).logits, expected, atol=2e-5)
        merged = adapted.merge_and_unload()
        np.testing.assert_allclose(merged(ids).logits, expected, atol=2e-5)
