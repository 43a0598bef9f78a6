"""Tasks: a task gives a run its examples, its loss and its metric."""

from megalodon_jax.tasks.audio import AudioTask
from megalodon_jax.tasks.classification import Classification
from megalodon_jax.tasks.images import PatchesTask, PathfinderTask, PixelsTask
from megalodon_jax.tasks.language import LanguageModeling
from megalodon_jax.tasks.listops import ListOpsTask
from megalodon_jax.tasks.loaders import (
    HeldoutLoader,
    OwnBatches,
    OwnHeldout,
    TrainingLoader,
    own_loaders,
)
from megalodon_jax.tasks.masked_language import MaskedLanguageModeling
from megalodon_jax.tasks.sft import SupervisedFineTuning
from megalodon_jax.tasks.task import StatefulTask, Task, find_stateful
from megalodon_jax.tasks.texts import RetrievalTask, TextTask

TASKS: dict[str, Task] = {
    "language": LanguageModeling(),
    "sft": SupervisedFineTuning(),
    "listops": ListOpsTask(),
    "pixels": PixelsTask(),
    "patches": PatchesTask(),
    "pathfinder": PathfinderTask(),
    "text": TextTask(),
    "retrieval": RetrievalTask(),
    "audio": AudioTask(),
    "masked_language": MaskedLanguageModeling(),
}


def find_task(name: str) -> Task:
    """The task of `config.task`."""
    return TASKS[name]


__all__ = [
    "TASKS", "Classification", "HeldoutLoader", "LanguageModeling", "MaskedLanguageModeling",
    "OwnBatches", "OwnHeldout",
    "StatefulTask", "SupervisedFineTuning", "Task", "TrainingLoader", "find_stateful", "find_task",
    "own_loaders",
]  # fmt: skip
