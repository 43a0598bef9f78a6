"""FLOPs of a model by formula, and the utilization of devices that follows from them."""

from megalodon_jax.chips import find_chip
from megalodon_jax.config import (
    AnyEncoderConfig,
    AnyModelConfig,
    EncoderConfig,
    ModelConfig,
    TransformerConfig,
    TransformerEncoderConfig,
)


def causal_flops_per_token(span: int, width: int) -> int:
    """FLOPs of one token's products of `width` features with the keys at or before it in a span.

    A token meets (span + 1) / 2 keys on average, at 2 FLOPs a feature.

    Args:
      span: tokens that attend to one another.
      width: features of all heads, summed over the products.
    """
    return (span + 1) * width


def model_flops_per_token(config: AnyModelConfig, *, seq_len: int | None = None) -> float:
    """Multiply-adds of forward and backward matrix products, times two, per trained token.

    MEGALODON, where g is 3 with SwiGLU, else 2:

        F = 3 * (layers * [2 (2DE + DZ + D^2 + ED) + 2gDF + (C + 1)(Z + E)] + 2DV)

    Transformer with H heads and K key and value heads of width d, where a token sees s keys on
    average, (L + 1) / 2 without a window:

        F = 3 * (layers * [2 (2DHd + 2DKd) + 6DF + 4sHd] + 2DV)

    Encoder, where a token sees s keys, the min(C, L) of its chunk if it is not causal:

        F = 3 * (layers * [2 (2DE + DZ + D^2 + ED) + 4DF + 2s(Z + E)] + 2D^2)

    Transformer encoder:

        F = 3 * (layers * [8D^2 + 6DF + 4sD] + 2D^2)

    and for both 2DV in place of 2D^2 for scores of tokens. Attention counts only pairs that are not
    masked by causality, chunks or the window; norms, CEMA and recomputation count nothing, so
    utilization from this number is a lower bound. The formula is therefore that of every moving
    average, norm, residual connection and position embedding.

    Args:
      config: the model's shape.
      seq_len: tokens L in a row; attention of MEGALODON never spans more than min(C, seq_len).

    Raises:
      ValueError: a Transformer, or an encoder without chunks, without `seq_len`.
    """
    if isinstance(config, TransformerConfig):
        return _transformer_flops(config, seq_len)
    if isinstance(config, AnyEncoderConfig):
        return _encoder_flops(config, seq_len)
    return _megalodon_flops(config, seq_len)


def _megalodon_flops(config: ModelConfig, seq_len: int | None) -> float:
    d, z, e = config.model_dim, config.z_dim, config.value_dim
    span = config.chunk_size if seq_len is None else min(config.chunk_size, seq_len)
    ffn = 2 * (3 if config.swiglu else 2) * d * config.ffn_hidden_dim
    projections = 2 * (2 * d * e + d * z + d * d + e * d)
    block = projections + ffn + causal_flops_per_token(span, z + e)
    return 3.0 * (config.num_layers * block + 2 * d * config.num_outputs)


def _encoder_flops(config: AnyEncoderConfig, seq_len: int | None) -> float:
    spans = [length for length in (config.chunk_size, seq_len) if length is not None]
    if not spans:
        raise ValueError("attention without chunks spans the row; pass seq_len")
    d, span = config.model_dim, min(spans)
    if isinstance(config, TransformerEncoderConfig):
        block = 8 * d * d + 6 * d * config.ffn_hidden_dim + 4 * span * d
    else:
        block = _encoder_block_flops(config, span)
    # The head of classes reads one vector of a document; before it every token has a product.
    outputs = config.vocab_size if config.head == "tokens" else d
    return 3.0 * (config.num_layers * block + 2 * d * outputs)


def _encoder_block_flops(config: EncoderConfig, span: int) -> int:
    d, z, e = config.model_dim, config.z_dim, config.value_dim
    projections = 2 * (2 * d * e + d * z + d * d + e * d)
    seen = causal_flops_per_token(span, z + e) if config.causal else 2 * span * (z + e)
    return projections + 4 * d * config.ffn_hidden_dim + seen


def _transformer_flops(config: TransformerConfig, seq_len: int | None) -> float:
    if seq_len is None:
        raise ValueError("attention of a Transformer spans the row; pass seq_len")
    d, heads = config.model_dim, config.num_heads * config.head_dim
    projections = 2 * (2 * d * heads + 2 * d * config.kv_heads * config.head_dim)
    ffn = 6 * d * config.ffn_hidden_dim
    keys = mean_visible_keys(seq_len, config.attention_window)
    block = projections + ffn + 4 * keys * heads
    return 3.0 * (config.num_layers * block + 2 * d * config.num_outputs)


def mean_visible_keys(length: int, window: int | None = None) -> float:
    """Mean number of keys that a token of a row sees, its own included.

    Args:
      length: tokens of the row.
      window: most keys of a token; None: all before it.
    """
    window = length if window is None else min(window, length)
    return window - window * (window - 1) / (2 * length)


def model_flops_utilization(
    tokens_per_second: float, flops_per_token: float, *, device_kind: str, device_count: int
) -> float | None:
    """MFU: the share of the devices' bfloat16 peak that model FLOPs use; None if it is unknown."""
    chip = find_chip(device_kind)
    if chip is None:
        return None
    peak = chip.device_flops_per_second * device_count
    return tokens_per_second * flops_per_token / peak
