"""Model FLOPs against a sum over all matrix products, and the utilization of devices."""

import pytest

from megalodon_jax.chips import find_chip
from megalodon_jax.config import ModelConfig
from megalodon_jax.flops import model_flops_per_token, model_flops_utilization


@pytest.mark.parametrize(
    ("preset", "expected"), [("mega200M", 1.29e9), ("mega1.3B", 8.32e9), ("paper_7b", 47.1e9)]
)
def test_flops_of_named_sizes(preset, expected):
    assert model_flops_per_token(ModelConfig.from_preset(preset)) == pytest.approx(
        expected, rel=3e-3
    )


def test_flops_count_every_matrix_product():
    config = ModelConfig(
        num_layers=3, model_dim=8, z_dim=4, value_dim=12, num_heads=2, ffn_hidden_dim=20,
        chunk_size=16, vocab_size=50, norm_num_groups=2, swiglu=True,
    )  # fmt: skip
    products = [(8, 4), (8, 12), (8, 12), (8, 8), (12, 8), (8, 20), (8, 20), (20, 8)]
    dense = sum(2 * rows * columns for rows, columns in products)
    length = 10
    # Token t of a row shorter than a chunk attends to t + 1 keys, for scores and for values.
    attention = sum(2 * (t + 1) * (4 + 12) for t in range(length)) / length
    expected = 3 * (3 * (dense + attention) + 2 * 8 * 50)
    assert model_flops_per_token(config, seq_len=length) == pytest.approx(expected)


def test_utilization_needs_a_known_peak():
    chip = find_chip("NVIDIA H200")
    assert chip is not None
    peak = chip.device_flops_per_second
    half = model_flops_utilization(peak / 1e9, 1e9, device_kind="NVIDIA H200", device_count=2)
    assert half == pytest.approx(0.5)
    assert model_flops_utilization(1e3, 1e9, device_kind="cpu", device_count=1) is None
