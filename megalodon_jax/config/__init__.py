"""Configuration of the model, data, optimizer, mesh and run.

A configuration is a tree of frozen dataclasses. It is read from a TOML file (`load_config`), single
fields can be overridden on the command line (`--optim.lr 3e-4`), and the resolved configuration is
stored in every checkpoint. The docstring of a field is its `--help` text.
"""

from megalodon_jax.config.data import DataConfig, HeldoutSet, MixtureSource, TextSource
from megalodon_jax.config.encoder import EncoderConfig
from megalodon_jax.config.examples import ExamplesConfig
from megalodon_jax.config.kinds import (
    AnyEncoderConfig,
    AnyModelConfig,
    LanguageModelConfig,
    model_config_class,
    model_preset,
)
from megalodon_jax.config.lora import LoraConfig
from megalodon_jax.config.mesh import MeshConfig, ProcessesConfig
from megalodon_jax.config.model import (
    DType,
    InitMode,
    KvFormat,
    ModelConfig,
    ModelOperation,
    MovingAverage,
    Remat,
    ResidualConnection,
    TimeNorm,
    WeightFormat,
)
from megalodon_jax.config.optimizer import OptimConfig
from megalodon_jax.config.parsing import config_from_dict, load_config
from megalodon_jax.config.run import TrainConfig
from megalodon_jax.config.sft import SftConfig
from megalodon_jax.config.transformer import AttentionImplementation, TransformerConfig
from megalodon_jax.config.transformer_encoder import TransformerEncoderConfig

__all__ = [
    "AnyEncoderConfig",
    "AnyModelConfig",
    "AttentionImplementation",
    "DType",
    "DataConfig",
    "EncoderConfig",
    "ExamplesConfig",
    "HeldoutSet",
    "InitMode",
    "KvFormat",
    "LanguageModelConfig",
    "LoraConfig",
    "MeshConfig",
    "MixtureSource",
    "ModelConfig",
    "ModelOperation",
    "MovingAverage",
    "OptimConfig",
    "ProcessesConfig",
    "Remat",
    "ResidualConnection",
    "SftConfig",
    "TextSource",
    "TimeNorm",
    "TrainConfig",
    "TransformerConfig",
    "TransformerEncoderConfig",
    "WeightFormat",
    "config_from_dict",
    "load_config",
    "model_config_class",
    "model_preset",
]
