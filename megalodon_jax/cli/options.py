"""Options that several commands share: the model that they load, and sampling."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from megalodon_jax.cli.progress import Progress
from megalodon_jax.config import KvFormat, ModelConfig, WeightFormat
from megalodon_jax.errors import ConfigError
from megalodon_jax.inference.sampling_params import SamplingParams

if TYPE_CHECKING:
    from megalodon_jax.checkpoints import TrainedModel
    from megalodon_jax.language_model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model of a command."""

    run_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """The run_dir of a training run or one of its checkpoints, a path or a URL gs:// or s3://; a
    .safetensors file; or a folder in the Hugging Face form."""
    step: int | None = None
    """Step of the checkpoint; the newest if not set."""
    allow_unverified: bool = False
    """Also load a checkpoint without manifest, which an older version wrote."""
    tokenizer: str = ""
    """Tokenizer file to use instead of the copy in the run."""

    def load(self, progress: Progress) -> "TrainedModel":
        """The model and its tokenizer; errors as for `load_with_tokenizer`."""
        # A local import: help and errors come without JAX.
        from megalodon_jax.pretrained import load_with_tokenizer

        progress.show(f"loading {self.run_dir}")
        return load_with_tokenizer(
            self.run_dir,
            step=self.step,
            allow_unverified=self.allow_unverified,
            tokenizer=self.tokenizer,
        )


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """Formats of a model's arrays in decoding."""

    weights: WeightFormat = "model"
    """Format of the weights in decoding: in the model's dtype (model), or 8-bit integers (int8)."""
    kv: KvFormat = "model"
    """Format of keys and values in decoding: in the model's dtype, or 8-bit integers (int8)."""

    def formats(self, model: "LanguageModel") -> dict[str, Any]:
        """The arguments `weights` and `kv` of `Engine`.

        Raises:
          ConfigError: the model does not have these formats.
        """
        check_formats(model, self.weights, self.kv)
        return {"weights": self.weights, "kv": self.kv}


def check_formats(model: "LanguageModel", weights: WeightFormat, kv: KvFormat) -> None:
    """Raises ConfigError if a model decodes with one format alone, and others are asked for."""
    for name, value in (("weights", weights), ("kv", kv)):
        if value != "model" and not isinstance(model.config, ModelConfig):
            raise ConfigError(
                f"--{name} is {value}, but a {type(model).__name__} decodes with model alone"
            )


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How a command draws tokens; its other options may be fields of `SamplingParams` too."""

    temperature: float = 0.8
    """Divides the logits; 0: greedy decoding."""
    top_k: int = 0
    """Sample from the k most probable tokens; 0: from all."""
    top_p: float = 1.0
    """Sample from the smallest set of most probable tokens whose probability reaches p."""
    min_p: float = 0.0
    """Sample from tokens with at least this share of the most probable token's probability."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or the output."""

    def sampling_params(self) -> SamplingParams:
        """The options of the command that are fields of `SamplingParams`.

        Raises:
          ConfigError: one of them is out of range.
        """
        names = {field.name for field in dataclasses.fields(self)}
        shared = names & {field.name for field in dataclasses.fields(SamplingParams)}
        try:
            return SamplingParams(**{name: getattr(self, name) for name in shared})
        except ValueError as error:
            raise ConfigError(str(error)) from error
