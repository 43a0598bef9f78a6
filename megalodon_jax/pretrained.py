"""Trained models in Python: `load` reads every form that this package writes, `save` writes one."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from megalodon_jax.checkpoints.load import TrainedModel
from megalodon_jax.config import TrainConfig
from megalodon_jax.config.model import DType
from megalodon_jax.data.tokenizer import ByteTokenizer, Tokenizer
from megalodon_jax.errors import ConfigError, ConvertError
from megalodon_jax.interop.huggingface import MAX_SHARD_BYTES, write_huggingface
from megalodon_jax.interop.initial_weights import load_base
from megalodon_jax.interop.safetensors_files import write_safetensors
from megalodon_jax.interop.sources import read_source, require_local
from megalodon_jax.language_model import LanguageModel
from megalodon_jax.lora import has_lora
from megalodon_jax.models import abstract_model
from megalodon_jax.parallel.sharding import with_shardings
from megalodon_jax.storage.files import exists
from megalodon_jax.storage.location import AnyPath, as_path
from megalodon_jax.train_state import abstract_run_model


class Pretrained(NamedTuple):
    """A trained model and its tokenizer; None: what was loaded has no tokenizer."""

    model: LanguageModel
    tokenizer: Tokenizer | None


def load(
    source: str | AnyPath,
    *,
    mesh: Mesh | None = None,
    dtype: DType | None = None,
    tokenizer: str = "",
    base: str = "",
    merge_lora: bool = True,
    step: int | None = None,
    allow_unverified: bool = False,
) -> Pretrained:
    """A trained model and its tokenizer, of any form that this package writes.

    Args:
      source: a run directory (its newest readable checkpoint) or one checkpoint
        (`runs/first/checkpoints/STEP`), also a URL gs:// or s3://; a .safetensors file that
        `convert` or `save` wrote; a folder in the Hugging Face form; a released checkpoint
        directory.
      mesh: devices over which the parameters are sharded by their logical axes, with which a call
        of the model needs `jax.set_mesh(mesh)`; None: the first device.
      dtype: dtype of the computation, "float32" or "bfloat16"; None: as trained. The parameters
        keep theirs.
      tokenizer: "bytes" or a tokenizer file to use instead of the model's own.
      base: where the base of a run with LoRA is now; empty: where the run has read it.
      merge_lora: merge the factors of a run with LoRA into their kernels; False: they stay beside
        them (`nnx.LoRAParam`), for a call of the model or training; `Engine` and `save` need them
        merged.
      step: step of a run's checkpoint; None: the newest readable one.
      allow_unverified: also load a run's checkpoint without manifest, with a warning.

    Returns:
      The model and its tokenizer. Released checkpoints, and models saved without a tokenizer, have
      none.

    Example:
      model, tokenizer = megalodon_jax.load("runs/first")

    Raises:
      ConvertError: there is no such source, it is of another kind, or its files are damaged.
      CheckpointError: the run has no readable checkpoint, or the base of its factors is missing.
      MismatchError: the base has other weights than those that the factors were trained for.
      DataError: the tokenizer cannot be read.
      ConfigError: the parameters do not divide over the mesh, or `step` is given without a run.
    """
    read = read_source(
        source,
        tokenizer=tokenizer,
        reads_tokenizer=True,
        step=step,
        allow_unverified=allow_unverified,
        mesh=mesh,
        load_base=partial(load_base, path=base),
        merges_lora=merge_lora,
    )
    graphdef, params = nnx.split(read.model, nnx.Param)
    if dtype is not None:
        # Only the static structure knows the dtype of the computation.
        changed = dataclasses.replace(read.model.config, dtype=dtype)
        graphdef, _ = abstract_model(changed)
        if read.lora is not None and not merge_lora:
            adapted = dataclasses.replace(
                read.config, model=changed, lora=read.lora, init_from=str(source)
            )
            graphdef = abstract_run_model(adapted).graphdef
    place = jax.local_devices()[0]
    if mesh is not None:
        place = jax.tree.map(lambda leaf: leaf.sharding, with_shardings(params, mesh))
    return Pretrained(nnx.merge(graphdef, jax.device_put(params, place)), read.tokenizer)


def load_with_tokenizer(
    source: str | AnyPath,
    *,
    step: int | None = None,
    allow_unverified: bool = False,
    tokenizer: str = "",
) -> TrainedModel:
    """`load` for commands that read and write text: a model without a tokenizer is refused.

    Raises:
      ConfigError: the model has no tokenizer and none is named, or `step` is given without a run.
      ConvertError, CheckpointError, DataError: as for `load`.
    """
    model, own = load(source, tokenizer=tokenizer, step=step, allow_unverified=allow_unverified)
    if not isinstance(model, LanguageModel):
        raise ConfigError(
            f"{source} is an encoder, which writes no text; use megalodon classify or evaluate"
        )
    if own is None:
        raise ConfigError(f"{source} has no tokenizer; name one with --tokenizer or tokenizer=")
    return TrainedModel(model, own)


def save(
    model: LanguageModel,
    path: str | AnyPath,
    *,
    tokenizer: Tokenizer | None = None,
    config: TrainConfig | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Saves a MEGALODON for `load`, `megalodon convert` and `transformers`.

    Args:
      model: the model, without ablations; its parameters may be sharded over devices of this
        process.
      path: a new local .safetensors file (released names), or a new folder in the Hugging Face
        form.
      tokenizer: the model's. A folder keeps its files; a .safetensors file can only say that it is
        the `ByteTokenizer`.
      config: the training configuration to keep; None: defaults with the model's sizes.
      max_shard_bytes: most bytes of weights in a file of a folder.

    Raises:
      ConvertError: the path exists or is a URL, the model cannot be saved in this form (a
        Transformer: keep its run directory), or the file cannot keep the tokenizer.
      StateDictError: the model is an ablation.
    """
    if has_lora(model):
        raise ConvertError(
            "the model has LoRA factors, for which this form has no names; save "
            "megalodon_jax.lora.merge_lora(model)"
        )
    path = as_path(path)
    require_local(path)
    path = Path(path)
    if exists(path):
        raise ConvertError(f"{path} exists and is not overwritten; give another path")
    run = _training_config(model, config)
    if path.suffix != ".safetensors":
        write_huggingface(
            model, path, config=run, tokenizer=tokenizer, max_shard_bytes=max_shard_bytes
        )
        return
    if tokenizer is not None and not isinstance(tokenizer, ByteTokenizer):
        raise ConvertError(
            f"{path} cannot keep a tokenizer's files; give a folder, or leave the tokenizer out "
            "and name its file in load(..., tokenizer=)"
        )
    if tokenizer is not None:
        run = dataclasses.replace(run, data=dataclasses.replace(run.data, tokenizer="bytes"))
    write_safetensors(model, path, run, has_tokenizer=tokenizer is not None or config is not None)


def _training_config(model: LanguageModel, config: TrainConfig | None) -> TrainConfig:
    if config is None:
        return TrainConfig(model=model.config)
    # The computation may have another dtype than in training.
    if dataclasses.replace(model.config, dtype=config.model.dtype) != config.model:
        raise ConvertError(
            "config.model and model.config differ; give the configuration that the model was "
            "trained with, or none"
        )
    return config
