"""Writing and reading of a folder that `transformers` loads with `trust_remote_code=True`."""

import dataclasses
import json
import secrets
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from megalodon_jax.config import ModelConfig, TrainConfig
from megalodon_jax.data.tokenizer import SentencePieceTokenizer, Tokenizer
from megalodon_jax.errors import ConfigError, ConvertError
from megalodon_jax.file_limits import MAX_METADATA_BYTES, read_json_table
from megalodon_jax.interop.huggingface.model_card import RunFacts, model_card
from megalodon_jax.interop.huggingface.shards import read_shards, write_shards
from megalodon_jax.interop.huggingface.tokenizer_files import read_tokenizer, tokenizer_files
from megalodon_jax.interop.released import from_state_dict, released_entries, to_state_dict
from megalodon_jax.interop.safetensors_files import (
    config_metadata,
    config_of_metadata,
    require_megalodon,
)
from megalodon_jax.language_model import LanguageModel
from megalodon_jax.model import Megalodon

MAX_SHARD_BYTES = 5_000_000_000
"""Most bytes of weights in a file, by default."""
MODEL_TYPE = "megalodon"
CONFIG_FILE = "config.json"
_TORCH_SOURCE = Path(__file__).parent / "torch_source"
# Fields of `ModelConfig` that the PyTorch model has under the same names.
_SHARED_FIELDS = (
    "vocab_size", "output_size", "num_layers", "model_dim", "z_dim", "value_dim", "num_heads",
    "ffn_hidden_dim", "cema_ndim", "chunk_size", "norm_num_groups", "norm_affine", "norm_eps",
    "norm_prior_count", "rope_base", "swiglu", "rescale_nffn", "scale_emb", "share_emb", "dropout",
    "hidden_dropout", "attention_dropout", "attention_dropout_mode",
)  # fmt: skip


class FolderContents(NamedTuple):
    """The contents of a folder.

    Attributes:
      model: the model, with arrays on the host.
      config: the training configuration; defaults if the folder keeps none.
      tokenizer: the tokenizer as `load_tokenizer` names it; None: the folder has none.
    """

    model: Megalodon
    config: TrainConfig
    tokenizer: str | None


def write_huggingface(
    model: LanguageModel,
    folder: str | Path,
    *,
    config: TrainConfig | None = None,
    tokenizer: Tokenizer | None = None,
    facts: RunFacts | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a folder for `transformers`: config, weights, tokenizer, PyTorch code, model card.

    The training configuration, with its paths, is in the metadata of the weights' files.

    Args:
      model: a MEGALODON without ablations.
      folder: a new local folder; an interrupted write leaves none.
      config: the training configuration; None: defaults with the model's sizes.
      tokenizer: the model's; None: the folder has none.
      facts: what the model card tells of the run; None: nothing.
      max_shard_bytes: most bytes of weights in a file, at least 1.

    Raises:
      ConvertError: the model cannot be written in this form, the folder exists, or the size is
        below 1.
    """
    folder = Path(folder)
    shape = require_megalodon(model.config)
    assert isinstance(model, Megalodon)
    released_entries(shape)
    if max_shard_bytes < 1:
        raise ConvertError(f"max_shard_bytes is {max_shard_bytes}; it must be at least 1")
    if folder.exists():
        raise ConvertError(f"{folder} exists and is not overwritten; give another target")
    run = TrainConfig(model=shape) if config is None else config
    unfinished = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.unfinished")
    unfinished.mkdir(parents=True)
    try:
        _write_contents(model, unfinished, run, tokenizer, max_shard_bytes)
        (unfinished / "README.md").write_text(model_card(model, facts), encoding="utf-8")
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _write_contents(
    model: Megalodon,
    folder: Path,
    run: TrainConfig,
    tokenizer: Tokenizer | None,
    max_shard_bytes: int,
) -> None:
    outside, per_block = released_entries(model.config)
    derived = {entry.name for entry in outside if not entry.path}
    derived |= {
        entry.name.format(i)
        for entry in per_block
        if not entry.path
        for i in range(model.config.num_layers)
    }
    # The PyTorch model computes them itself.
    arrays = {name: value for name, value in to_state_dict(model).items() if name not in derived}
    metadata = config_metadata(run, has_tokenizer=tokenizer is not None)
    write_shards(arrays, folder, metadata=metadata, max_shard_bytes=max_shard_bytes)
    _write_json(folder / CONFIG_FILE, _config_table(model.config, tokenizer))
    _write_json(folder / "generation_config.json", _generation_table(tokenizer))
    for name in ("configuration_megalodon.py", "modeling_megalodon.py"):
        shutil.copyfile(_TORCH_SOURCE / name, folder / name)
    if isinstance(tokenizer, SentencePieceTokenizer):
        name = "tokenization_megalodon.py"
        shutil.copyfile(_TORCH_SOURCE / name, folder / name)
    for name, content in ({} if tokenizer is None else tokenizer_files(tokenizer)).items():
        (folder / name).write_bytes(content)


def _config_table(config: ModelConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["MegalodonForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_megalodon.MegalodonConfig",
            "AutoModelForCausalLM": "modeling_megalodon.MegalodonForCausalLM",
        },
        "torch_dtype": config.param_dtype,
        "tie_word_embeddings": config.share_emb,
        **_boundary_ids(tokenizer),
        **{name: getattr(config, name) for name in _SHARED_FIELDS},
    }


def _generation_table(tokenizer: Tokenizer | None) -> dict[str, Any]:
    return {"_from_model_config": False, "use_cache": True, **_boundary_ids(tokenizer)}


def _boundary_ids(tokenizer: Tokenizer | None) -> dict[str, int]:
    if tokenizer is None:
        return {}
    # Rows of a batch are padded with the token that ends them.
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.eos_id,
    }


def _write_json(path: Path, table: dict[str, Any]) -> None:
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def is_huggingface_folder(folder: Path) -> bool:
    """Whether a folder has a `config.json` with the model type of this form."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        return False
    table = read_json_table(path, max_bytes=MAX_METADATA_BYTES, error=ConvertError)
    return table.get("model_type") == MODEL_TYPE


def read_huggingface(folder: str | Path) -> FolderContents:
    """Reads a folder that `write_huggingface` or transformers' `save_pretrained` wrote.

    Raises:
      ConvertError: a file is missing or damaged, or the configurations in `config.json` and in the
        weights' metadata contradict each other.
      StateDictError: the weights do not match the configuration.
    """
    folder = Path(folder)
    table = read_json_table(folder / CONFIG_FILE, max_bytes=MAX_METADATA_BYTES, error=ConvertError)
    if table.get("model_type") != MODEL_TYPE:
        raise ConvertError(
            f"{folder} has a model of type {table.get('model_type')!r:.80}; it must be {MODEL_TYPE}"
        )
    arrays, metadata = read_shards(folder)
    run = config_of_metadata(folder, metadata)
    if run is None:
        run = TrainConfig(model=_config_of_table(folder, table))
    shape = require_megalodon(run.model)
    _check_same_sizes(folder, table, shape)
    model = from_state_dict(shape, arrays)
    tokenizer = read_tokenizer(folder)
    if tokenizer is not None:
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, tokenizer=tokenizer))
    return FolderContents(model, run, tokenizer)


def _config_of_table(folder: Path, table: dict[str, Any]) -> ModelConfig:
    """The model of a folder that transformers has saved, which drops the metadata."""
    sizes = {name: table[name] for name in _SHARED_FIELDS if name in table}
    dtype = table.get("dtype", table.get("torch_dtype", "float32"))
    try:
        return ModelConfig(**sizes, param_dtype=dtype)
    except (ConfigError, TypeError) as error:
        raise ConvertError(f"{folder / CONFIG_FILE}: {error}") from error


def _check_same_sizes(folder: Path, table: dict[str, Any], config: ModelConfig) -> None:
    differing = [
        f"{name} is {table[name]!r:.80} and {getattr(config, name)!r}"
        for name in _SHARED_FIELDS
        if name in table and table[name] != getattr(config, name)
    ]
    if differing:
        raise ConvertError(
            f"{CONFIG_FILE} and the metadata of the weights in {folder} differ: "
            f"{'; '.join(differing)}; use files of one model"
        )
