"""Settings that several modules share."""

from dataclasses import dataclass
from typing import Literal, Self

from megalodon_jax.config import AnyEncoderConfig, ModelConfig
from pallas_kernels.common.dispatch import Implementation


@dataclass(frozen=True, kw_only=True)
class DropoutRates:
    """Dropped fractions of attention and around it; each is active only with a dropout key.

    Attributes:
      output: of the sub-layer's output.
      hidden: inside the sub-layer.
      attention: of attention.
      attention_mode: attention drops weights after the softmax, or scores before it (DropKey).
    """

    output: float = 0.0
    hidden: float = 0.0
    attention: float = 0.0
    attention_mode: Literal["softmax", "dropkey"] = "softmax"

    @classmethod
    def from_config(cls, config: ModelConfig | AnyEncoderConfig) -> Self:
        """The rates of a model."""
        return cls(
            output=config.dropout,
            hidden=config.hidden_dropout,
            attention=config.attention_dropout,
            attention_mode=config.attention_dropout_mode,
        )


@dataclass(frozen=True, kw_only=True)
class Implementations:
    """The implementation of every operation; None: the fastest known for the platform.

    Attributes:
      attention: of chunk attention with documents or a cache.
      whole_row_attention: of chunk attention over rows of one document, without a cache; None: as
        `attention`.
    """

    cema: Implementation | None = None
    timestep_norm: Implementation | None = None
    attention: Implementation | None = None
    whole_row_attention: Implementation | None = None
    rowwise: Implementation | None = None

    @classmethod
    def from_config(cls, config: ModelConfig) -> Self:
        """The implementations that a model's configuration asks for."""
        return cls(
            cema=config.implementation_of("cema"),
            timestep_norm=config.implementation_of("timestep_norm"),
            attention=config.implementation_of("attention"),
            whole_row_attention=config.whole_row_attention_implementation,
            rowwise=config.implementation_of("rowwise"),
        )
