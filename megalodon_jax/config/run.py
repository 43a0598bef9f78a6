"""Configuration of a training run."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from megalodon_jax.config.checks import Rule, check
from megalodon_jax.config.data import DataConfig
from megalodon_jax.config.kinds import AnyModelConfig
from megalodon_jax.config.mesh import MeshConfig, ProcessesConfig
from megalodon_jax.config.model import ModelConfig
from megalodon_jax.config.optimizer import OptimConfig
from megalodon_jax.config.ranges import (
    Content,
    Interval,
    Range,
    Seed,
    Steps,
    Text,
    Tokens,
    Weight,
)

RULES = (
    Rule(
        lambda c: c.optim.warmup_steps <= c.steps,
        "optim.warmup_steps is {c.optim.warmup_steps}, longer than the run of steps = {c.steps}; "
        "use at most {c.steps}",
    ),
    Rule(
        lambda c: c.resume_step is None or c.resume,
        "resume_step is {c.resume_step}, but resume is not set; add --resume",
    ),
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run: model, data, optimizer, mesh and settings of the loop."""

    model: AnyModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    processes: ProcessesConfig = field(default_factory=ProcessesConfig)
    task: Literal["language"] = "language"
    """Task of the run: its examples, its loss and its metric."""
    run_dir: Annotated[str, Text(may_be_empty=False)] = "runs/default"
    """Directory of the run's checkpoints, logs and resolved configuration."""
    steps: Steps = 1000
    """Number of updates."""
    seed: Seed = 0
    """Seed of parameter initialization and dropout."""
    z_loss: Weight = 0.0
    """Weight of the z-loss log(Z)^2, which keeps the logits' log-normalizer near 0."""
    loss_chunk_size: Tokens = 2048
    """Tokens per slice of the loss; logits exist for one slice at a time."""
    log_every: Steps = 10
    """Steps between log lines."""
    eval_every: Interval = 200
    """Steps between held-out evaluations; 0: only at the end."""
    eval_batches: Interval = 8
    """Batches of a held-out evaluation during training."""
    final_eval_batches: Interval = 64
    """Batches of the final held-out evaluation."""
    checkpoint_every: Interval = 200
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: Steps = 3
    """Number of newest checkpoints to keep; an older one is deleted after a later finite loss. The
    checkpoint of the lowest held-out loss is kept too."""
    keep_every: Interval = 0
    """Keep every checkpoint whose step is a multiple of this; 0: none."""
    init_from: str = ""
    """Initialize the weights from this run_dir, trained or converted; empty: random weights."""
    resume: bool = False
    """Resume from the newest checkpoint in `run_dir`."""
    resume_step: Annotated[int | None, Range(low=0, high=2_000_000_000)] = None
    """With `resume`: the step to resume from; later checkpoints are renamed to `later_<step>`."""
    allow_unverified: bool = False
    """Also load checkpoints without manifest, which older versions wrote; damage goes unnoticed."""
    sample_tokens: Interval = 256
    """Tokens of the text sample generated at the end; 0: no sample."""
    sample_prompt: Content = ""
    """Prompt of the text sample."""
    wandb_project: str = ""
    """Weights & Biases project to log to; empty: none."""

    def __post_init__(self) -> None:
        check(self, "", RULES)
