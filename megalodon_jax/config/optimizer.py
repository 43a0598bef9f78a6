"""Configuration of the optimizer and its learning-rate schedule."""

from dataclasses import dataclass
from typing import Literal

from megalodon_jax.config.checks import check_literals, require


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule, as released (weight decay of every parameter)."""

    lr: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay of the learning rate after the warmup."""
    warmup_steps: int = 100
    """Steps of the linear warmup from lr * init_ratio to lr."""
    init_ratio: float = 1e-4
    """Initial learning rate as a fraction of lr."""
    end_ratio: float = 0.01
    """Final learning rate as a fraction of lr."""
    beta1: float = 0.9
    """Decay rate of the first moment."""
    beta2: float = 0.95
    """Decay rate of the second moment: 0.95 for large models, 0.98 for small ones."""
    eps: float = 1e-8
    """Epsilon added to the square root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay, multiplied by the learning rate."""
    clip_norm: float = 1.0
    """Clip the gradient to this global norm; 0: no clipping."""
    accumulate_steps: int = 1
    """Gradient accumulation: batches per update, weighted by their tokens."""

    def __post_init__(self) -> None:
        check_literals(self, "optim")
        require(self.lr > 0, f"optim.lr is {self.lr}; must be positive")
        require(
            self.warmup_steps >= 0,
            f"optim.warmup_steps is {self.warmup_steps}; must not be negative",
        )
        require(self.clip_norm >= 0, f"optim.clip_norm is {self.clip_norm}; must not be negative")
        require(
            self.accumulate_steps >= 1,
            f"optim.accumulate_steps is {self.accumulate_steps}; must be at least 1",
        )
