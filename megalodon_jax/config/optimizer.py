"""The optimizer and its learning-rate schedule."""

from dataclasses import dataclass
from typing import Literal

from megalodon_jax.config.checks import check_literals, require


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule, as in the released code (every parameter decays)."""

    lr: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the decay after warm-up."""
    warmup_steps: int = 100
    """Steps in which the rate rises from lr * init_ratio to lr."""
    init_ratio: float = 1e-4
    """First rate over the peak rate."""
    end_ratio: float = 0.01
    """Last rate over the peak rate."""
    beta1: float = 0.9
    """Decay of the gradient's moving average."""
    beta2: float = 0.95
    """Decay of the squared gradient's average: 0.95 for large models, 0.98 for small ones."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay, times the learning rate."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0 means no clipping."""
    accumulate_steps: int = 1
    """Batches whose gradients make one update, weighted by their tokens."""

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
