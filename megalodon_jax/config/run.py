"""One training run: all the other configurations, and the settings of the run itself."""

from dataclasses import dataclass, field
from typing import Literal

from megalodon_jax.config.checks import check_literals, require
from megalodon_jax.config.data import DataConfig
from megalodon_jax.config.mesh import MeshConfig, ProcessesConfig
from megalodon_jax.config.model import ModelConfig
from megalodon_jax.config.optimizer import OptimConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    processes: ProcessesConfig = field(default_factory=ProcessesConfig)
    task: Literal["language"] = "language"
    """What the run trains on: its examples, its loss and its metric."""
    run_dir: str = "runs/default"
    """Directory of the run's checkpoints, logs and resolved configuration."""
    steps: int = 1000
    """Updates of the weights."""
    seed: int = 0
    """Seed of start values and dropout."""
    z_loss: float = 0.0
    """Weight of log(Z)^2, which keeps logits near zero."""
    loss_chunk_size: int = 2048
    """Tokens whose logits exist at a time in the loss."""
    log_every: int = 10
    """Steps between lines of metrics."""
    eval_every: int = 200
    """Steps between held-out measurements; 0: only at the end."""
    eval_batches: int = 8
    """Batches of a held-out measurement during training."""
    final_eval_batches: int = 64
    """Batches of the held-out measurement at the end."""
    checkpoint_every: int = 200
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: int = 3
    """Newest checkpoints that are kept."""
    init_from: str = ""
    """Start with the weights of this run_dir, trained or converted; empty: fresh weights."""
    resume: bool = False
    """Go on from the newest checkpoint in `run_dir`."""
    sample_tokens: int = 256
    """Tokens of generated text shown at the end; 0: none."""
    sample_prompt: str = ""
    """Start of the generated text."""
    wandb_project: str = ""
    """Also log to this Weights & Biases project; empty: no."""

    def __post_init__(self) -> None:
        check_literals(self, "config")
        for name in ("steps", "loss_chunk_size", "keep_checkpoints", "log_every"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}; must be at least 1")
