"""Pictures that a classification run leaves beside its metrics."""

from pathlib import Path

from megalodon_jax.config import TrainConfig
from megalodon_jax.evaluation.pictures import confusion_matrix, learning_curve, read_series
from megalodon_jax.evaluation.summary import Evaluation
from megalodon_jax.tasks import Classification, Task

CURVE, CONFUSION = "learning_curve.svg", "confusion.svg"


def write_pictures(run_dir: Path, heldout: Evaluation, config: TrainConfig, task: Task) -> None:
    """Writes the learning curve and the confusion matrix of a run.

    Args:
      run_dir: the run's local directory, with `metrics.jsonl`.
      heldout: the final evaluation.
      config: the run.
      task: of the run.
    """
    series = read_series(run_dir / "metrics.jsonl", ("accuracy", "heldout_accuracy"))
    curve = learning_curve(series, title=f"{config.task}: accuracy")
    (run_dir / CURVE).write_text(curve, encoding="utf-8")
    names = task.class_names(config) if isinstance(task, Classification) else ()
    if heldout.confusion is not None:
        title = f"{config.task}: {heldout.accuracy:.2%} of {heldout.num_tokens:,} held-out examples"
        picture = confusion_matrix(heldout.confusion, names, title=title)
        (run_dir / CONFUSION).write_text(picture, encoding="utf-8")
