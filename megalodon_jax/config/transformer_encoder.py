"""Configuration of the Transformer encoder that MEGALODON's encoder is compared with."""

from dataclasses import dataclass
from typing import Literal

from megalodon_jax.config.checks import Rule, check
from megalodon_jax.config.encoder_settings import ENCODER_RULES, EncoderSettings
from megalodon_jax.config.ranges import Size
from pallas_kernels.common.dispatch import Implementation

RULES = (
    Rule(
        lambda c: c.model_dim % c.num_heads == 0 and c.head_dim % 2 == 0,
        "model.model_dim {c.model_dim} over num_heads {c.num_heads} must give an even head width, "
        "for rotary pairs",
    ),
    *ENCODER_RULES,
)


@dataclass(frozen=True, kw_only=True)
class TransformerEncoderConfig(EncoderSettings):
    """Sizes and numerics of a Transformer encoder; the defaults have the size of ListOps."""

    kind: Literal["transformer_encoder"] = "transformer_encoder"
    """Architecture."""
    num_heads: Size = 5
    """Number of attention heads H, each `model_dim / num_heads` wide."""
    ffn_hidden_dim: Size = 280
    """Hidden width F of the SwiGLU feed-forward network."""

    def __post_init__(self) -> None:
        check(self, "model", RULES)

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.model_dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads: as many as query heads."""
        return self.num_heads

    @property
    def causal(self) -> bool:
        """Whether a token sees only the tokens up to itself: never."""
        return False

    def implementation_of(
        self, operation: Literal["attention", "rowwise"]
    ) -> Implementation | None:
        """The implementation of an operation; None: the fastest known for the platform."""
        if operation == "attention":
            return self.attention_implementation
        return self.rowwise_implementation
