"""Configuration of the optimizer and its learning-rate schedule."""

from dataclasses import dataclass
from typing import Annotated, Literal

from megalodon_jax.config.checks import check
from megalodon_jax.config.ranges import Interval, Range, Ratio, Size, Weight

# In float32, 1 - beta of a larger beta is 0 and the bias correction divides by it.
Decay = Annotated[float, Range(low=0.0, high=0.999999)]
# A smaller norm, and a smaller epsilon below, underflow in float32: 0 / 0, or updates of any size.
ClipNorm = Annotated[float, Range(low=1e-20, special=(0, "no clipping"))]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule, as released (weight decay of every parameter)."""

    lr: Annotated[float, Range(low=0.0, open_low=True)] = 1e-3
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay of the learning rate after the warmup."""
    warmup_steps: Interval = 100
    """Steps of the linear warmup from lr * init_ratio to lr."""
    init_ratio: Ratio = 1e-4
    """Initial learning rate as a fraction of lr."""
    end_ratio: Ratio = 0.01
    """Final learning rate as a fraction of lr."""
    beta1: Decay = 0.9
    """Decay rate of the first moment."""
    beta2: Decay = 0.95
    """Decay rate of the second moment: 0.95 for large models, 0.98 for small ones."""
    eps: Annotated[float, Range(low=1e-20, high=1.0)] = 1e-8
    """Epsilon added to the square root of the second moment."""
    weight_decay: Weight = 0.1
    """Decoupled weight decay, multiplied by the learning rate."""
    clip_norm: ClipNorm = 1.0
    """Clip the gradient to this global norm; 0: no clipping."""
    accumulate_steps: Size = 1
    """Gradient accumulation: batches per update, weighted by their tokens."""

    def __post_init__(self) -> None:
        check(self, "optim")
