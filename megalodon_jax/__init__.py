"""MEGALODON in JAX: a language model with unlimited context (Ma et al. 2024, arXiv 2404.08801)."""

from megalodon_jax.cache import Cache, LayerCache
from megalodon_jax.config import ModelConfig, TrainConfig, load_config
from megalodon_jax.errors import ConfigError
from megalodon_jax.loss import LossOutput, cross_entropy
from megalodon_jax.model import HiddenOutput, Megalodon, ModelOutput
from megalodon_jax.typing import Batch
from megalodon_jax.version import __version__

__all__ = [
    "Batch",
    "Cache",
    "ConfigError",
    "HiddenOutput",
    "LayerCache",
    "LossOutput",
    "Megalodon",
    "ModelConfig",
    "ModelOutput",
    "TrainConfig",
    "__version__",
    "cross_entropy",
    "load_config",
]
