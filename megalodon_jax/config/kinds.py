"""The configurations of all kinds of models, by the name in `model.kind`."""

from collections.abc import Mapping
from typing import Any

from megalodon_jax.config.checks import require, shown
from megalodon_jax.config.encoder import EncoderConfig
from megalodon_jax.config.model import ModelConfig
from megalodon_jax.config.transformer import TransformerConfig
from megalodon_jax.config.transformer_encoder import TransformerEncoderConfig
from megalodon_jax.errors import did_you_mean
from megalodon_jax.presets import read_preset

LanguageModelConfig = ModelConfig | TransformerConfig
AnyEncoderConfig = EncoderConfig | TransformerEncoderConfig
AnyModelConfig = ModelConfig | TransformerConfig | EncoderConfig | TransformerEncoderConfig
MODEL_CONFIGS: dict[str, type[AnyModelConfig]] = {
    "megalodon": ModelConfig,
    "transformer": TransformerConfig,
    "encoder": EncoderConfig,
    "transformer_encoder": TransformerEncoderConfig,
}


def model_config_class(table: Mapping[str, Any]) -> type[AnyModelConfig]:
    """The configuration class of a `[model]` table by its `kind`; MEGALODON if it has none.

    Raises:
      ConfigError: there is no such kind; the closest name is suggested.
    """
    kind = table.get("kind", "megalodon")
    require(
        isinstance(kind, str) and kind in MODEL_CONFIGS,
        f"model.kind is {shown(kind)}{did_you_mean(shown(kind), list(MODEL_CONFIGS))}; use one "
        f"of {', '.join(map(repr, MODEL_CONFIGS))}",
    )
    return MODEL_CONFIGS[kind]


def model_preset(name: str, **overrides: Any) -> AnyModelConfig:
    """A named size of any kind from `configs/models/<name>.toml`, with overrides.

    Raises:
      ConfigError: there is no such preset, or an override is unknown or out of range.
    """
    kind = model_config_class(read_preset("models", name))
    return kind.from_preset(name, **overrides)
