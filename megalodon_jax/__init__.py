"""MEGALODON in JAX: a language model with unlimited context (Ma et al. 2024, arXiv 2404.08801).

Names are imported on first use, so that `import megalodon_jax` does not import JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

from megalodon_jax.version import __version__

if TYPE_CHECKING:
    from megalodon_jax.baselines.transformer import Transformer
    from megalodon_jax.cache import Cache, LayerCache
    from megalodon_jax.config import (
        MeshConfig,
        ModelConfig,
        TrainConfig,
        TransformerConfig,
        load_config,
    )
    from megalodon_jax.errors import ConfigError
    from megalodon_jax.language_model import (
        HiddenOutput,
        HiddenStatesOutput,
        LanguageModel,
        ModelOutput,
    )
    from megalodon_jax.loss import LossOutput, cross_entropy
    from megalodon_jax.model import Megalodon
    from megalodon_jax.typing import Batch

_MODULES = {
    "Batch": "typing",
    "Cache": "cache",
    "ConfigError": "errors",
    "HiddenOutput": "language_model",
    "HiddenStatesOutput": "language_model",
    "LanguageModel": "language_model",
    "LayerCache": "cache",
    "LossOutput": "loss",
    "Megalodon": "model",
    "MeshConfig": "config",
    "ModelConfig": "config",
    "ModelOutput": "language_model",
    "TrainConfig": "config",
    "Transformer": "baselines.transformer",
    "TransformerConfig": "config",
    "cross_entropy": "loss",
    "load_config": "config",
}

__all__ = [
    "Batch",
    "Cache",
    "ConfigError",
    "HiddenOutput",
    "HiddenStatesOutput",
    "LanguageModel",
    "LayerCache",
    "LossOutput",
    "Megalodon",
    "MeshConfig",
    "ModelConfig",
    "ModelOutput",
    "TrainConfig",
    "Transformer",
    "TransformerConfig",
    "__version__",
    "cross_entropy",
    "load_config",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
