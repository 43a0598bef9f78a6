"""Configuration of low-rank adaptation (LoRA)."""

from dataclasses import dataclass
from typing import Annotated

from megalodon_jax.config.checks import Rule, check
from megalodon_jax.config.ranges import Interval, Range, Rate

RULES = (
    Rule(
        lambda c: not c.rank or bool(c.targets),
        "lora.rank is {c.rank} but lora.targets is empty; name kernels, such as layers.*.kernel",
    ),
)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adaptation (Hu et al. 2021): W + (alpha / rank) A B, of which A and B are trained.

    The base, from `init_from`, is frozen and not saved with the run.
    """

    rank: Interval = 0
    """Rank r: columns of A and rows of B; 0: the whole model is trained."""
    alpha: Annotated[float, Range(low=0.0, open_low=True)] = 16.0
    """The product A B is multiplied by alpha / rank."""
    targets: tuple[str, ...] = ("layers.*.kernel",)
    """Kernels of linear layers that get factors: patterns of dotted names, such as
    ``layers.mega.w[vz].kernel``; by default all of the blocks."""
    dropout: Rate = 0.0
    """Dropped fraction of the input of A B in training."""

    def __post_init__(self) -> None:
        check(self, "lora", RULES)
