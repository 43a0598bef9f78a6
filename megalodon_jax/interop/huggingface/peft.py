"""LoRA factors in the files of PEFT, beside a base in the Hugging Face form."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from megalodon_jax.config import LoraConfig
from megalodon_jax.errors import ConvertError
from megalodon_jax.interop.safetensors_files import require_megalodon
from megalodon_jax.language_model import LanguageModel
from megalodon_jax.lora import linear_kernels

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# The prefix of PEFT before the names of the model's own modules.
_PREFIX = "base_model.model."


def write_peft_adapter(
    model: LanguageModel, folder: str | Path, *, lora: LoraConfig, base: str
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`.

    Modules have the names of the PyTorch model in the Hugging Face form. PEFT's factors are
    lora_A (r, in) and lora_B (out, r): the transposes of A and B here.

    Args:
      model: a MEGALODON with factors that are not merged.
      folder: a new local folder.
      lora: rank, alpha and dropout.
      base: the base, which PEFT loads first: for it a folder in the Hugging Face form.

    Raises:
      ConvertError: the model is of another kind, or the folder exists.
    """
    require_megalodon(model.config)
    folder = Path(folder)
    if folder.exists():
        raise ConvertError(f"{folder} exists and is not overwritten; give another target")
    arrays: dict[str, np.ndarray] = {}
    modules: list[str] = []
    for name, linear in linear_kernels(model).items():
        if linear.lora is None:
            continue
        module = name.removeprefix("layers.").removesuffix(".kernel")
        modules.append(module)
        for factor, param in (("lora_A", linear.lora_a), ("lora_B", linear.lora_b)):
            for layer, value in enumerate(np.asarray(param[...])):
                key = f"{_PREFIX}layers.{layer}.{module}.{factor}.weight"
                arrays[key] = np.ascontiguousarray(value.T)
    folder.mkdir(parents=True)
    save_file(arrays, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})
    table = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
