"""FLOPs of a model by formula, and the utilization of devices that follows from them."""

from megalodon_jax.chips import find_chip
from megalodon_jax.config import ModelConfig


def causal_flops_per_token(span: int, width: int) -> int:
    """FLOPs of one token's products of `width` features with the keys at or before it in a span.

    A token meets (span + 1) / 2 keys on average, at 2 FLOPs a feature.

    Args:
      span: tokens that attend to one another.
      width: features of all heads, summed over the products.
    """
    return (span + 1) * width


def model_flops_per_token(config: ModelConfig, *, seq_len: int | None = None) -> float:
    """Multiply-adds of forward and backward matrix products, times two, per trained token.

        F = 3 * (layers * [2 (2DE + DZ + D^2 + ED) + 2gDF + (C + 1)(Z + E)] + 2DV)

    g is 3 with SwiGLU, else 2. Attention counts only the causal half inside chunks; norms, CEMA
    and recomputation count nothing, so utilization from this number is a lower bound.

    Args:
      config: the model's shape.
      seq_len: tokens in a row; attention never spans more than min(C, seq_len) of them.
    """
    d, z, e = config.model_dim, config.z_dim, config.value_dim
    span = config.chunk_size if seq_len is None else min(config.chunk_size, seq_len)
    ffn = 2 * (3 if config.swiglu else 2) * d * config.ffn_hidden_dim
    projections = 2 * (2 * d * e + d * z + d * d + e * d)
    block = projections + ffn + causal_flops_per_token(span, z + e)
    return 3.0 * (config.num_layers * block + 2 * d * config.num_outputs)


def model_flops_utilization(
    tokens_per_second: float, flops_per_token: float, *, device_kind: str, device_count: int
) -> float | None:
    """MFU: the share of the devices' bfloat16 peak that model FLOPs use; None if it is unknown."""
    chip = find_chip(device_kind)
    if chip is None:
        return None
    peak = chip.device_flops_per_second * device_count
    return tokens_per_second * flops_per_token / peak
