"""Configuration of the optimizer and its learning-rate schedule."""

from dataclasses import dataclass
from typing import Annotated, Literal

from megalodon_jax.config.checks import Rule, check
from megalodon_jax.config.ranges import Interval, Range, Rate, Ratio, Size, Weight

# In float32, 1 - beta of a larger beta is 0 and the bias correction divides by it.
Decay = Annotated[float, Range(low=0.0, high=0.999999)]
# A smaller norm, and a smaller epsilon below, underflow in float32: 0 / 0, or updates of any size.
ClipNorm = Annotated[float, Range(low=1e-20, special=(0, "no clipping"))]

RULES = (
    Rule(
        lambda c: (c.schedule == "wsd") == (c.decay_steps > 0),
        "optim.schedule is {c.schedule!r} and optim.decay_steps is {c.decay_steps}; the schedule "
        "wsd needs decay_steps above 0, the others need 0",
    ),
    Rule(
        lambda c: c.lr_scale == 1.0 or bool(c.scaled_lr),
        "optim.lr_scale is {c.lr_scale} and optim.scaled_lr is empty; name the parameters there",
    ),
)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its schedule; the defaults are those of the released code."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon: Muon (Jordan et al. 2024) for the matrices of the layers, with updates of
    AdamW's size (Liu et al. 2025), and AdamW for all other parameters."""
    lr: Annotated[float, Range(low=0.0, open_low=True)] = 1e-3
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    """Decay of the learning rate after the warmup; wsd (warmup, stable, decay): constant, then
    1 - sqrt over the last decay_steps."""
    decay_steps: Interval = 0
    """Steps of the decay at the end of the schedule wsd."""
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
    no_weight_decay: tuple[str, ...] = ()
    """Parameters without weight decay: patterns of dotted names, such as ``*.bias``."""
    scaled_lr: tuple[str, ...] = ()
    """Parameters with the learning rate lr * lr_scale: patterns of dotted names, such as
    ``*.cema.*``."""
    lr_scale: Annotated[float, Range(low=0.0, open_low=True, high=1000.0)] = 1.0
    """Factor of the learning rate of the parameters that scaled_lr names."""
    frozen: tuple[str, ...] = ()
    """Parameters that are not trained: patterns of dotted names, such as ``embed.*``; they have no
    optimizer state."""
    muon_momentum: Decay = 0.95
    """Decay rate of Muon's momentum."""
    ema_decay: Rate = 0.0
    """Decay rate of the exponential moving average of the parameters, which held-out evaluations
    and later uses of the run take; 0: no average."""
    clip_norm: ClipNorm = 1.0
    """Clip the gradient to this global norm; 0: no clipping."""
    accumulate_steps: Size = 1
    """Gradient accumulation: batches per update, weighted by their tokens."""

    def __post_init__(self) -> None:
        check(self, "optim", RULES)
