"""Tasks: a task gives a run its examples, its loss and its metric."""

from megalodon_jax.tasks.language import LanguageModeling
from megalodon_jax.tasks.loaders import (
    HeldoutLoader,
    OwnBatches,
    OwnHeldout,
    TrainingLoader,
    own_loaders,
)
from megalodon_jax.tasks.sft import SupervisedFineTuning
from megalodon_jax.tasks.task import StatefulTask, Task, find_stateful

TASKS: dict[str, Task] = {"language": LanguageModeling(), "sft": SupervisedFineTuning()}


def find_task(name: str) -> Task:
    """The task of `config.task`."""
    return TASKS[name]


__all__ = [
    "TASKS", "HeldoutLoader", "LanguageModeling", "OwnBatches", "OwnHeldout",
    "StatefulTask", "SupervisedFineTuning", "Task", "TrainingLoader", "find_stateful", "find_task",
    "own_loaders",
]  # fmt: skip
