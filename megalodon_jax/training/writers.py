"""Writers of metrics beside `metrics.jsonl`: TensorBoard, Weights & Biases, or your own."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from megalodon_jax.errors import ConfigError


class MetricWriter(Protocol):
    """Receives every record of a run's metrics; process 0 calls it, in its main thread."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics of a step."""
        ...

    def write_text(self, step: int, name: str, text: str) -> None:
        """Records a text, such as the settings that a resumed run has changed."""
        ...

    def close(self) -> None:
        """Ends the output; called once, also after an error."""
        ...


class TensorBoardWriter:
    """Writes a new event file in a folder.

    Args:
      folder: created if it does not exist.
      first_step: updates before this run was resumed; TensorBoard drops later points of before.

    Raises:
      OSError: the file cannot be written, with its name; so may every method.
    """

    def __init__(self, folder: Path, *, first_step: int = 0) -> None:
        # A local import: it takes half a second, which help and errors do not need.
        from megalodon_jax.training.tensorboard import EventFile

        self._folder = folder
        # The point of `first_step` is valid.
        with naming(folder):
            self._file = EventFile(folder, purge_step=first_step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds a point per metric."""
        with naming(self._folder):
            for name, value in metrics.items():
                self._file.add_scalar(name, value, step)
            self._file.flush()

    def write_text(self, step: int, name: str, text: str) -> None:
        """Adds a text."""
        with naming(self._folder):
            self._file.add_text(name, text, step)
            self._file.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        with naming(self._folder):
            self._file.close()


class WandbWriter:
    """Logs to a project of Weights & Biases.

    Args:
      project: its name.
      run_dir: directory of wandb's files.
      config: the run's resolved configuration.

    Raises:
      ConfigError: wandb is not installed.
    """

    def __init__(self, project: str, *, run_dir: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigError(
                f"wandb_project is {project!r} but wandb is not installed; "
                "install megalodon-flax[wandb] or leave wandb_project empty"
            ) from error
        self._run: Any = wandb.init(project=project, dir=str(run_dir), config=dict(config))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs the metrics."""
        self._run.log(dict(metrics), step=step)

    def write_text(self, step: int, name: str, text: str) -> None:
        """Adds the text to the run's summary, with its step."""
        self._run.summary[f"{name}/{step}"] = text

    def close(self) -> None:
        """Ends the wandb run."""
        self._run.finish()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the name of a file to the errors of its open handle."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
