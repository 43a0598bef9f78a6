"""MEGALODON in JAX: a language model with unlimited context (Ma et al. 2024, arXiv 2404.08801).

Names are imported on first use, so that `import megalodon_jax` does not import JAX.
"""

from typing import TYPE_CHECKING

from megalodon_jax.lazy_names import lazy_names
from megalodon_jax.version import __version__

if TYPE_CHECKING:
    from megalodon_jax.baselines.transformer import Transformer
    from megalodon_jax.baselines.transformer_encoder import TransformerEncoder
    from megalodon_jax.cache import Cache, LayerCache
    from megalodon_jax.config import (
        EncoderConfig,
        MeshConfig,
        ModelConfig,
        TrainConfig,
        TransformerConfig,
        TransformerEncoderConfig,
        load_config,
    )
    from megalodon_jax.encoder import Encoder
    from megalodon_jax.errors import ConfigError
    from megalodon_jax.generate import Completion, generate_text
    from megalodon_jax.inference.engine import Engine
    from megalodon_jax.inference.sampling_params import SamplingParams
    from megalodon_jax.language_model import (
        HiddenOutput,
        HiddenStatesOutput,
        LanguageModel,
        ModelOutput,
    )
    from megalodon_jax.loss import LossOutput, cross_entropy
    from megalodon_jax.model import Megalodon
    from megalodon_jax.pretrained import Pretrained, load, save
    from megalodon_jax.typing import Batch

_MODULES = {
    "Batch": "typing",
    "Cache": "cache",
    "Completion": "generate",
    "ConfigError": "errors",
    "Encoder": "encoder",
    "EncoderConfig": "config",
    "Engine": "inference.engine",
    "HiddenOutput": "language_model",
    "HiddenStatesOutput": "language_model",
    "LanguageModel": "language_model",
    "LayerCache": "cache",
    "LossOutput": "loss",
    "Megalodon": "model",
    "MeshConfig": "config",
    "ModelConfig": "config",
    "ModelOutput": "language_model",
    "Pretrained": "pretrained",
    "SamplingParams": "inference.sampling_params",
    "TrainConfig": "config",
    "Transformer": "baselines.transformer",
    "TransformerConfig": "config",
    "TransformerEncoder": "baselines.transformer_encoder",
    "TransformerEncoderConfig": "config",
    "cross_entropy": "loss",
    "generate_text": "generate",
    "load": "pretrained",
    "load_config": "config",
    "save": "pretrained",
}

__all__ = [
    "Batch",
    "Cache",
    "Completion",
    "ConfigError",
    "Encoder",
    "EncoderConfig",
    "Engine",
    "HiddenOutput",
    "HiddenStatesOutput",
    "LanguageModel",
    "LayerCache",
    "LossOutput",
    "Megalodon",
    "MeshConfig",
    "ModelConfig",
    "ModelOutput",
    "Pretrained",
    "SamplingParams",
    "TrainConfig",
    "Transformer",
    "TransformerConfig",
    "TransformerEncoder",
    "TransformerEncoderConfig",
    "__version__",
    "cross_entropy",
    "generate_text",
    "load",
    "load_config",
    "save",
]

__getattr__, __dir__ = lazy_names(__name__, _MODULES, globals())
