"""Results of the runs of a study, as they are kept in JSON."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megalodon_jax.errors import ConfigError
from megalodon_jax.file_limits import FileLimitError, read_bytes
from megalodon_jax.study.definition import Mode, Run, Study

RUN_DIR = "run"
EVALUATIONS = "evaluations"
_RESULT_FILE = "result.json"
RESULTS_FILE = "results.json"
_MAX_BYTES = 200_000_000
# Points of a training curve that are kept.
_CURVE_POINTS = 200


class CurvePoint(NamedTuple):
    """Losses after a number of updates.

    Attributes:
      step: updates.
      tokens: trained tokens.
      seconds: time of the updates, without start, compilation, evaluation and saving.
      values: loss, or losses of held-out sets, by their names in the metrics.
    """

    step: int
    tokens: float
    seconds: float
    values: dict[str, float]


class RunResult(NamedTuple):
    """The result of one run.

    Attributes:
      stage: name of its stage.
      variant: name of its variant.
      point: its values of the grid.
      seed: its seed.
      table: its configuration, as in a file of `megalodon train`.
      status: `done` or `failed`.
      error: the end of a failed process's messages.
      exit_code: of a failed process.
      device: its devices, such as "1 x NVIDIA H200".
      parameters: number of parameters.
      parameters_without_embeddings: without the embedding and the output matrix.
      tokens: trained tokens.
      seconds: time of the updates.
      seconds_total: time of the whole run, over all its starts.
      tokens_per_second: median over the reports of the run.
      final: last value of every metric, those of the last held-out evaluation included.
      training: loss in training.
      heldout: held-out losses.
      evaluations: what the study's evaluations wrote, by name.
      failed_evaluations: messages of those that failed.
      init_from: directory of the run, below the study's, whose weights it started from.
    """

    stage: str
    variant: str
    point: dict[str, Any]
    seed: int
    table: dict[str, Any]
    status: Literal["done", "failed"]
    error: str = ""
    exit_code: int | None = None
    device: str = ""
    parameters: int = 0
    parameters_without_embeddings: int = 0
    tokens: float = 0.0
    seconds: float = 0.0
    seconds_total: float = 0.0
    tokens_per_second: float = 0.0
    final: dict[str, float] = {}  # noqa: RUF012
    training: tuple[CurvePoint, ...] = ()
    heldout: tuple[CurvePoint, ...] = ()
    evaluations: dict[str, Any] = {}  # noqa: RUF012
    failed_evaluations: dict[str, str] = {}  # noqa: RUF012
    init_from: str = ""

    @property
    def name(self) -> str:
        """Stage, variant, point and seed."""
        point = "".join(f" {key.rpartition('.')[2]} {value}" for key, value in self.point.items())
        return f"{self.stage} {self.variant}{point} seed {self.seed}"

    @property
    def point_text(self) -> str:
        """Its values of the grid, "optim.lr 0.001, model.chunk_size 16"; empty without a grid."""
        return ", ".join(f"{key} {value}" for key, value in self.point.items())

    def describe(self) -> str:
        """One line about the end of the run."""
        if self.status == "failed":
            return f"failed with exit code {self.exit_code}: {self.error}"
        losses = [
            f"{name} {value:.4f}"
            for name, value in self.final.items()
            if name.startswith(("heldout_bits_per_byte", "heldout_accuracy"))
        ]
        return ", ".join(losses) or f"loss {self.final.get('loss', math.nan):.4f}"


class StudyResults(NamedTuple):
    """All results of a study.

    Attributes:
      name: the study's name.
      title: the study's title.
      metric: the study's metric.
      runs: one for each run that has ended, in order.
      mode: the study's mode.
    """

    name: str
    title: str
    metric: str
    runs: tuple[RunResult, ...]
    mode: Mode = "min"


def failed_result(run: Run, *, exit_code: int | None, error: str, init_from: str = "") -> RunResult:
    """The result of a run that failed."""
    return RunResult(
        stage=run.stage,
        variant=run.variant,
        point=dict(run.point),
        seed=run.seed,
        table=dict(run.table),
        status="failed",
        exit_code=exit_code,
        error=error,
        init_from=init_from,
    )


def read_run(
    run: Run, directory: Path, *, failed_evaluations: dict[str, str], init_from: str = ""
) -> RunResult:
    """The result of a run that has ended, from its metrics and its evaluations' files."""
    config = run.config(str(directory / RUN_DIR))
    per_step = config.data.batch_size * config.data.seq_len * max(1, config.optim.accumulate_steps)
    lines = (directory / RUN_DIR / "metrics.jsonl").read_text().splitlines()
    records = _without_repeated([json.loads(line) for line in lines])
    training = [record for record in records if "loss" in record]
    seconds = {record["step"]: record["seconds_steps"] for record in training}
    points = [
        CurvePoint(step, float(step * per_step), seconds[step], {"loss": record["loss"]})
        for record in training
        for step in [record["step"]]
    ]
    heldout = [
        CurvePoint(
            record["step"],
            float(record["step"] * per_step),
            _seconds_at(record["step"], seconds),
            {name: value for name, value in record.items() if name.startswith("heldout_")},
        )
        for record in records
        if any(name.startswith("heldout_") for name in record)
    ]
    final = {
        name: float(value)
        for record in (training[-1:] + [point.values for point in heldout[-1:]])
        for name, value in record.items()
        if isinstance(value, int | float)
    }
    # The first step of a start has no speed: it waits for the compilation.
    speeds = sorted(r["tokens_per_second"] for r in training if "tokens_per_second" in r)
    run_time = json.loads((directory / RUN_DIR / "run_time.json").read_text())
    parameters, without = _count_parameters(config.model)
    return RunResult(
        stage=run.stage,
        variant=run.variant,
        point=dict(run.point),
        seed=run.seed,
        table=dict(run.table),
        status="done",
        device=run_time.get("devices", ""),
        parameters=parameters,
        parameters_without_embeddings=without,
        tokens=points[-1].tokens if points else 0.0,
        seconds=run_time["seconds"]["steps"],
        seconds_total=sum(run_time["seconds"].values()),
        tokens_per_second=speeds[len(speeds) // 2] if speeds else 0.0,
        final=final,
        training=tuple(_thinned(points)),
        heldout=tuple(heldout),
        evaluations={
            path.stem: json.loads(path.read_text())
            for path in sorted((directory / EVALUATIONS).glob("*.json"))
        },
        failed_evaluations=failed_evaluations,
        init_from=init_from,
    )


def write_result(directory: Path, result: RunResult) -> None:
    """Marks a run as finished."""
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / _RESULT_FILE, _as_table(result))


def read_result(directory: Path) -> RunResult | None:
    """The result of a run; None if it has not ended.

    Raises:
      ConfigError: the file is damaged.
    """
    path = directory / _RESULT_FILE
    return _result(_read_json(path), path) if path.exists() else None


def write_results(out: Path, study: Study, results: Sequence[RunResult]) -> None:
    """Writes the results of all runs that have ended to `out/results.json`."""
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "name": study.name,
        "title": study.title,
        "metric": study.metric,
        "mode": study.mode,
        "runs": [_as_table(result) for result in results],
    }
    _write_json(out / RESULTS_FILE, content)


def read_results(path: str | Path) -> StudyResults:
    """Reads the file that `write_results` wrote.

    Raises:
      ConfigError: the file is missing or damaged.
    """
    path = Path(path)
    table = _read_json(path)
    try:
        runs = tuple(_result(entry, path) for entry in table["runs"])
        # Results of versions without a mode have losses.
        mode = table.get("mode", "min")
        return StudyResults(table["name"], table["title"], table["metric"], runs, mode)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not the results of a study: {error!r}") from error


def _result(table: Any, path: Path) -> RunResult:
    try:
        curves = {
            name: tuple(CurvePoint(*point) for point in table[name])
            for name in ("training", "heldout")
        }
        return RunResult(**{**table, **curves})
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a result of this version: {error!r}") from error


def _as_table(result: RunResult) -> dict[str, Any]:
    return {**result._asdict(), "training": list(result.training), "heldout": list(result.heldout)}


def _without_repeated(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Records by step; a resumed run writes those after its checkpoint again."""
    kept: dict[tuple[int, bool], Mapping[str, Any]] = {}
    for record in records:
        kept[record["step"], "loss" in record] = record
    return [kept[key] for key in sorted(kept)]


def _seconds_at(step: int, seconds: Mapping[int, float]) -> float:
    """The time of the last report up to a step, extended to the step."""
    before = [at for at in seconds if at <= step]
    return seconds[max(before)] * step / max(before) if before else 0.0


def _thinned(points: Sequence[CurvePoint]) -> list[CurvePoint]:
    every = math.ceil(len(points) / _CURVE_POINTS) or 1
    return [point for i, point in enumerate(points) if (len(points) - 1 - i) % every == 0]


def _count_parameters(config: Any) -> tuple[int, int]:
    """Parameters with and without the embedding and the output matrix."""
    import jax

    from megalodon_jax.models import abstract_model

    leaves = jax.tree_util.tree_leaves_with_path(abstract_model(config)[1])
    sizes = [(jax.tree_util.keystr(path), leaf.size) for path, leaf in leaves]
    tables = ("['embed']", "['output']", "['inputs']['embed']")
    outside = sum(size for path, size in sizes if path.startswith(tables))
    total = sum(size for _, size in sizes)
    return total, total - outside


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_bytes(path, max_bytes=_MAX_BYTES))
    except FileLimitError as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: {error}") from error


def _write_json(path: Path, content: Any) -> None:
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(unfinished, path)
