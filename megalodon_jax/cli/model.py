"""The model that `generate`, `chat`, `serve` and `evaluate` name."""

from pathlib import Path
from typing import TYPE_CHECKING

from megalodon_jax.errors import ConfigError
from megalodon_jax.storage.location import is_store

if TYPE_CHECKING:
    from megalodon_jax.checkpoints import TrainedModel


def load_named_model(
    path: str, step: int | None, *, allow_unverified: bool, tokenizer: str
) -> "TrainedModel":
    """A model and its tokenizer.

    Args:
      path: a run directory or its URL, a .safetensors file, or a folder in the Hugging Face form.
      step: step of a run's checkpoint; None: the newest readable one.
      allow_unverified: also load a run's checkpoint without manifest, with a warning.
      tokenizer: file to use instead of the model's own.

    Raises:
      ConfigError: the model has no tokenizer and none is named, or `step` is set without a run.
      ConvertError: the file or the folder cannot be read.
      CheckpointError: the run has no readable checkpoint.
      DataError: the tokenizer cannot be read.
    """
    # Local imports: help and errors come without JAX.
    from megalodon_jax.checkpoints import TrainedModel, load_trained
    from megalodon_jax.interop.initial_weights import load_base
    from megalodon_jax.pretrained import load

    if is_store(path) or not _is_saved_model(Path(path)):
        return load_trained(
            path,
            step,
            allow_unverified=allow_unverified,
            tokenizer=tokenizer,
            load_base=load_base,
        )
    if step is not None:
        raise ConfigError(f"--step {step} names a checkpoint of a run, and {path} is none")
    model, own = load(path, tokenizer=tokenizer)
    if own is None:
        raise ConfigError(f"{path} has no tokenizer; name one with --tokenizer")
    return TrainedModel(model, own)


def _is_saved_model(path: Path) -> bool:
    """Whether a local path is a file or a folder in the Hugging Face form, not a run."""
    from megalodon_jax.interop.huggingface.folder import is_huggingface_folder

    return not (path / "checkpoints").is_dir() and (path.is_file() or is_huggingface_folder(path))
