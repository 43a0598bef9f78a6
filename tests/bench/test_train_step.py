"""The benchmark of a training step runs and reports what it promises."""

from megalodon_jax.bench.train_step import time_step
from megalodon_jax.config import DataConfig, ModelConfig, TrainConfig


def test_time_step():
    model = ModelConfig(
        num_layers=1, model_dim=16, z_dim=8, value_dim=16, ffn_hidden_dim=16, chunk_size=8,
        vocab_size=30, norm_num_groups=4,
    )  # fmt: skip
    config = TrainConfig(model=model, data=DataConfig(batch_size=2, seq_len=16))
    timing = time_step(config, documents=2, steps=2)
    assert timing.tokens_per_second > 0
    assert timing.utilization is None
    assert timing.argument_bytes > 3 * 4 * (2 * 30 * 16)
    assert timing.temporary_bytes > 0
