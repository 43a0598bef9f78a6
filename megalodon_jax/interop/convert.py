"""Conversion between released checkpoints, .safetensors files, runs and the Hugging Face form."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import jax
from flax import nnx

from megalodon_jax.checkpoints import save_model
from megalodon_jax.checkpoints.tokenizer_files import relative_path
from megalodon_jax.config import LoraConfig, TrainConfig, load_config, model_preset
from megalodon_jax.errors import ConvertError
from megalodon_jax.interop.huggingface import MAX_SHARD_BYTES, push_to_hub, write_huggingface
from megalodon_jax.interop.huggingface.model_card import RunFacts, read_run_facts
from megalodon_jax.interop.huggingface.peft import write_peft_adapter
from megalodon_jax.interop.huggingface.push import require_hub
from megalodon_jax.interop.initial_weights import load_base
from megalodon_jax.interop.safetensors_files import (
    read_safetensors,
    require_megalodon,
    write_safetensors,
)
from megalodon_jax.interop.sources import Source, is_run, read_source, require_local
from megalodon_jax.interop.vocabulary import add_special_tokens, grow_vocabulary
from megalodon_jax.presets import preset_names
from megalodon_jax.storage.files import exists
from megalodon_jax.storage.location import AnyPath, as_path, is_store

__all__ = ["convert", "read_safetensors"]

Form = Literal["safetensors", "run", "huggingface"]


def convert(
    source: str | AnyPath,
    target: str | AnyPath,
    config: str | None = None,
    *,
    to: Form | None = None,
    tokenizer: str = "",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    push: str = "",
    allow_unverified: bool = False,
    merge: bool = False,
    base: str = "",
    special_tokens: Sequence[str] = (),
) -> str:
    """Converts a model's weights; never overwrites a file or directory.

    Args:
      source: a released checkpoint directory (config.json and consolidated*.pth, model-parallel
        shards included), one released .pth file, a .safetensors file with released names, a
        folder in the Hugging Face form, or a run_dir of this project, also a URL of an object
        store.
      target: a new .safetensors file (released names, configuration in the metadata), or a new
        folder; a run_dir may be a URL.
      config: a TOML file or the name of a preset, for a source without a configuration.
      to: form of a folder: "run", for `generate`, `evaluate` and `train`, or "huggingface"; None:
        "huggingface" from a run_dir to a local folder, else "run". A name with .safetensors is
        "safetensors".
      tokenizer: the model's tokenizer file, for a source that has none; empty: the source's own.
      max_shard_bytes: most bytes of a file of weights in the Hugging Face form.
      push: repository "owner/name" to which the folder in the Hugging Face form is uploaded; empty:
        none.
      allow_unverified: also read a run's checkpoint without manifest, with a warning.
      merge: merge the LoRA factors of a run into their kernels; False: a folder gets the factors
        alone, in the files of PEFT.
      base: where the base of a run with LoRA is now; empty: where the run has read it.
      special_tokens: tokens to add to the tokenizer, with rows in the embedding and the output
        matrix that are the mean of the old ones; scores of old tokens stay.

    Returns:
      A line that describes what was written.

    Raises:
      ConvertError: the source is of another kind or has no configuration, the target exists, or the
        upload failed; or the form holds no LoRA factors.
      MismatchError: the base has other weights than those that the factors were trained for.
      ConfigError: `push` needs a package that is not installed.
      StateDictError: the weights do not match the configuration; the entries are named.
    """
    source, target = as_path(source), as_path(target)
    if exists(target):
        raise ConvertError(f"{target} exists and is not overwritten; give another target")
    form = _form(source, target, to)
    _check_push(push, form, target)
    read = read_source(
        source,
        None if config is None else _read_config(config),
        tokenizer=tokenizer,
        reads_tokenizer=form == "huggingface" or bool(special_tokens),
        allow_unverified=allow_unverified,
        load_base=partial(load_base, path=base),
        merges_lora=merge,
    )
    require_megalodon(read.config.model)
    if special_tokens:
        read = _with_special_tokens(read, special_tokens, target, form, merge=merge)
    if read.lora is not None and not merge:
        contents = _write_adapter(read, target, form, read.lora, base)
    elif merge and read.lora is None:
        raise ConvertError(f"{source} has no LoRA factors to merge; leave --merge out")
    else:
        contents = _write(read, target, form, max_shard_bytes)
    if push:
        contents += f"; uploaded: {push_to_hub(Path(target), push)}"
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(read.model, nnx.Param)))
    return f"wrote {target}: {count:,} parameters from {source} ({contents})"


def _check_push(push: str, form: Form, target: AnyPath) -> None:
    if not push:
        return
    if form != "huggingface":
        raise ConvertError(
            f"only the Hugging Face form can be uploaded to {push}, and {target} is to be a "
            f"{form}; add --to huggingface"
        )
    require_hub()


def _form(source: AnyPath, target: AnyPath, to: Form | None) -> Form:
    if to is not None and to not in get_args(Form):
        raise ConvertError(f"to is {to!r}; use {', '.join(get_args(Form))}")
    if target.suffix == ".safetensors":
        if to not in (None, "safetensors"):
            raise ConvertError(f"{target} is the name of a file; give a folder for {to!r}")
        return "safetensors"
    if target.suffix or to == "safetensors":
        raise ConvertError(
            f"cannot write {target}; give a name that ends in .safetensors, or a folder"
        )
    if to is not None:
        return to
    # Only run directories are written to an object store.
    return "huggingface" if is_run(source) and not is_store(target) else "run"


def _write(read: Source, target: AnyPath, form: Form, max_shard_bytes: int) -> str:
    """Writes one form; returns a few words on it."""
    if form == "run":
        config = dataclasses.replace(read.config, run_dir=str(target))
        save_model(read.model, target, config, tokenizer=read.tokenizer)
        return "a run directory for generate, evaluate and init_from"
    require_local(target)
    target = Path(target)
    if form == "safetensors":
        write_safetensors(
            read.model, target, read.config, has_tokenizer=read.tokenizer_name is not None
        )
        return f"released names, {target.stat().st_size / 1e6:,.1f} MB"
    write_huggingface(
        read.model,
        target,
        config=read.config,
        tokenizer=read.tokenizer,
        facts=_facts(read),
        max_shard_bytes=max_shard_bytes,
    )
    has = "" if read.tokenizer is not None else ", without a tokenizer"
    return f"the Hugging Face form{has}"


def _with_special_tokens(
    read: Source, tokens: Sequence[str], target: AnyPath, form: Form, *, merge: bool
) -> Source:
    """The source with a tokenizer and a model that know more tokens."""
    if form == "safetensors" or read.tokenizer is None or (read.lora is not None and not merge):
        reason = "the source has no tokenizer; name one with --tokenizer"
        if form == "safetensors":
            reason = f"{target} would keep no tokenizer; give a folder"
        elif read.tokenizer is not None:
            reason = "LoRA factors have no rows of tokens; add --merge"
        raise ConvertError(f"cannot add special tokens: {reason}")
    tokenizer = add_special_tokens(read.tokenizer, tokens)
    model = grow_vocabulary(read.model, tokenizer.vocab_size, num_trained=read.tokenizer.vocab_size)
    # The copy that a run keeps.
    data = dataclasses.replace(
        read.config.data, tokenizer=str(target / str(relative_path(tokenizer)))
    )
    config = dataclasses.replace(read.config, model=model.config, data=data)
    return read._replace(model=model, config=config, tokenizer=tokenizer)


def _write_adapter(read: Source, target: AnyPath, form: Form, lora: LoraConfig, base: str) -> str:
    """Writes the LoRA factors alone; returns a few words on them."""
    if form != "huggingface":
        raise ConvertError(
            f"the source has LoRA factors, for which the form {form!r} has no names; add --merge "
            "to write the merged model, or --to huggingface for the files of PEFT"
        )
    require_local(target)
    write_peft_adapter(read.model, Path(target), lora=lora, base=base or read.config.init_from)
    return f"LoRA factors of rank {lora.rank} in the files of PEFT"


def _facts(read: Source) -> RunFacts | None:
    if read.run is None or read.run.step is None:
        return None
    return read_run_facts(read.run.directory, read.config, read.run.step)


def _read_config(name: str) -> TrainConfig:
    if name in preset_names():
        return TrainConfig(model=model_preset(name))
    return load_config(name)
