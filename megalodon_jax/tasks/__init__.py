"""What a run trains on: a task gives examples, a loss and a metric."""

from megalodon_jax.tasks.language import LanguageModeling
from megalodon_jax.tasks.task import Task

TASKS: dict[str, Task] = {"language": LanguageModeling()}


def find_task(name: str) -> Task:
    """The task of `config.task`."""
    return TASKS[name]


__all__ = ["TASKS", "LanguageModeling", "Task", "find_task"]
