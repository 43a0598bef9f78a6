"""The file of a study: the settings that all runs share, variants, stages, evaluations."""

import copy
import itertools
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from megalodon_jax.config import TrainConfig
from megalodon_jax.config.parsing import MAX_CONFIG_BYTES, config_from_dict
from megalodon_jax.errors import ConfigError, did_you_mean
from megalodon_jax.file_limits import FileLimitError, read_bytes

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
Settings = Mapping[str, Any]
Mode = Literal["min", "max"]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One of the things that are compared.

    Attributes:
      name: letters, digits, '_', '-' and '.'.
      settings: tables of a run's configuration that differ from those of the study's `run`.
    """

    name: str
    settings: Settings = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Runs of all variants, for every point of a grid and every seed.

    Attributes:
      name: as for a variant.
      settings: tables that differ from those of the study's `run`, in all variants.
      grid: values by dotted setting, such as `optim.lr`; a run for every combination.
      seeds: values of `seed` and `data.shuffle_seed`, the same for all variants.
      best_of: an earlier stage with one seed or more: each variant takes the point of its grid with
        the best mean metric there.
      init_from: an earlier stage without a grid of its own: each run starts from the weights of the
        same variant's run there, with the same seed, or with the only one.
      variants: names of those that run; empty: all.
      evaluate: run the study's evaluations after each run.
    """

    name: str
    settings: Settings = field(default_factory=dict)
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    best_of: str = ""
    init_from: str = ""
    variants: tuple[str, ...] = ()
    evaluate: bool = False


@dataclass(frozen=True, kw_only=True)
class StudyEvaluation:
    """A command `megalodon evaluate` that runs after a training run.

    Attributes:
      name: its key in the results.
      arguments: the command's arguments, without `--checkpoint` and `--json`.
      variants: names of the variants that it is for; empty: all.
      stages: names of the stages that it is for; empty: all with `evaluate`.
    """

    name: str
    arguments: tuple[str, ...]
    variants: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StudyExamples:
    """A command `megalodon examples` that runs before the first training run.

    Attributes:
      name: the name of its record in the study's directory.
      arguments: the command's arguments, `--out` among them: the file that runs read.
    """

    name: str
    arguments: tuple[str, ...]

    @property
    def file(self) -> str:
        """The path that follows `--out`."""
        return self.arguments[self.arguments.index("--out") + 1]


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study as its file defines it.

    Attributes:
      name: name of its results.
      title: one line for tables and pictures.
      metric: name in a run's metrics that decides between points of a grid and that the table
        shows.
      mode: `min` if lower values are better, `max` for accuracies.
      run: the configuration that all runs share, as in a file of `megalodon train`.
      variants: what is compared; the first is the one that others are compared with.
      stages: in order.
      evaluations: after runs of stages with `evaluate`.
      examples: files of training examples that are written first.
    """

    name: str
    title: str
    metric: str
    mode: Mode
    run: Settings
    variants: tuple[Variant, ...]
    stages: tuple[Stage, ...]
    evaluations: tuple[StudyEvaluation, ...] = ()
    examples: tuple[StudyExamples, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run.

    Attributes:
      stage: name of its stage.
      variant: name of its variant.
      point: its values of the grid, by dotted setting.
      seed: its seed.
      table: its configuration as a nested table, without `run_dir` and the `init_from` of a stage.
      evaluations: what runs after it.
      init_from: the stage from whose run of this variant it starts; empty: from random weights.
    """

    stage: str
    variant: str
    point: Mapping[str, Any]
    seed: int
    table: Settings
    evaluations: tuple[StudyEvaluation, ...]
    init_from: str = ""

    @property
    def name(self) -> str:
        """The path of its directory below the study's, see `run_name`."""
        return run_name(self)

    def config(self, run_dir: str) -> TrainConfig:
        """The checked configuration; `ConfigError` as for `config_from_dict`."""
        return config_from_dict({**copy.deepcopy(dict(self.table)), "run_dir": run_dir})


class _Named(Protocol):
    @property
    def stage(self) -> str: ...
    @property
    def variant(self) -> str: ...
    @property
    def point(self) -> Mapping[str, Any]: ...
    @property
    def seed(self) -> int: ...


def run_name(run: _Named) -> str:
    """`stage/variant/point`, the path of a run's directory below the study's."""
    point = [f"{key.rpartition('.')[2]}={value}" for key, value in run.point.items()]
    return "/".join([run.stage, run.variant, ",".join([*point, f"seed={run.seed}"])])


def read_study(path: str | Path) -> Study:
    """Reads a study's TOML file and checks the configuration of every run.

    Raises:
      ConfigError: the file is missing or malformed, a key is unknown, a name is used twice, or a
        run has settings that `megalodon train` refuses.
    """
    try:
        table = tomllib.loads(read_bytes(path, max_bytes=MAX_CONFIG_BYTES).decode("utf-8"))
    except FileLimitError as error:
        raise ConfigError(f"cannot read study {path}: {error}") from error
    except OSError as error:
        raise ConfigError(f"cannot read study {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    try:
        study = study_from_dict(table)
        for stage in study.stages:
            for run in _all_points(study, stage):
                _check_run(run)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return study


def study_from_dict(table: Settings) -> Study:
    """Builds a `Study` from nested mappings; `ConfigError` names the key that is wrong."""
    values = _checked(table, Study, "study", required=("name", "run", "variants", "stages"))
    for key in ("name", "title", "metric"):
        if not isinstance(values.get(key, ""), str):
            raise ConfigError(f"study.{key} is {values[key]!r}; use a string")
    metric = values.get("metric", "heldout_loss")
    study = Study(
        name=_name(values["name"], "study"),
        title=values.get("title", values["name"]),
        metric=metric,
        mode=_mode(values.get("mode", "min"), metric),
        run=_table(values["run"], "run"),
        variants=tuple(_variant(entry) for entry in _tables(values["variants"], "variants")),
        stages=tuple(_stage(entry) for entry in _tables(values["stages"], "stages")),
        evaluations=tuple(
            _evaluation(entry) for entry in _tables(values.get("evaluations", []), "evaluations")
        ),
        examples=tuple(
            _examples(entry) for entry in _tables(values.get("examples", []), "examples")
        ),
    )
    _check_references(study)
    return study


def stage_runs(
    study: Study, stage: Stage, best: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Run]:
    """The runs of a stage, seeds last, so that every variant is run before the next seed.

    Args:
      study: the study.
      stage: one of its stages.
      best: with `best_of`, the chosen point of every variant that has one; the others do not run.
    """
    chosen = {} if best is None else best
    variants = [v for v in study.variants if not stage.variants or v.name in stage.variants]
    runs = []
    for seed, point in itertools.product(stage.seeds, _points(stage.grid)):
        for variant in variants:
            if stage.best_of and variant.name not in chosen:
                continue
            own_point = {**chosen.get(variant.name, {}), **point}
            table = _merged(study.run, variant.settings, stage.settings)
            for key, value in own_point.items():
                table = _merged(table, _nested(key, value))
            table = _merged(table, {"seed": seed, "data": {"shuffle_seed": seed}})
            evaluations = tuple(
                entry
                for entry in study.evaluations
                if stage.evaluate
                and (not entry.variants or variant.name in entry.variants)
                and (not entry.stages or stage.name in entry.stages)
            )
            runs.append(
                Run(
                    stage=stage.name,
                    variant=variant.name,
                    point=own_point,
                    seed=seed,
                    table=table,
                    evaluations=evaluations,
                    init_from=stage.init_from,
                )
            )
    return runs


def start_of(run: Run, earlier: Sequence[Run]) -> Run | None:
    """The run, one of `earlier`, from whose weights a run with `init_from` starts.

    None if its variant has no run there, because it has no best point.
    """
    own = [r for r in earlier if (r.stage, r.variant) == (run.init_from, run.variant)]
    return next((r for r in own if len(own) == 1 or r.seed == run.seed), None)


def _all_points(study: Study, stage: Stage) -> list[Run]:
    """The runs of a stage; of a stage with `best_of` those of any point that may be chosen."""
    if not stage.best_of:
        return stage_runs(study, stage)
    earlier = next(entry for entry in study.stages if entry.name == stage.best_of)
    points = _points(earlier.grid)
    names = [variant.name for variant in study.variants]
    return [
        run for point in points for run in stage_runs(study, stage, dict.fromkeys(names, point))
    ]


def _check_run(run: Run) -> None:
    try:
        run.config("run")
    except ConfigError as error:
        raise ConfigError(f"{run.name}: {error}") from error


def _points(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    combinations = itertools.product(*grid.values())
    return [dict(zip(grid, values, strict=True)) for values in combinations]


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _merged(*tables: Settings) -> dict[str, Any]:
    """The tables, later values instead of earlier ones, nested tables merged."""
    result: dict[str, Any] = {}
    for table in tables:
        for key, value in table.items():
            before = result.get(key)
            nested = isinstance(value, Mapping) and isinstance(before, Mapping)
            result[key] = _merged(before, value) if nested else copy.deepcopy(value)  # type: ignore[arg-type]
    return result


def _variant(entry: Settings) -> Variant:
    values = _checked(entry, Variant, "variants", required=("name",))
    name = _name(values["name"], "variants")
    return Variant(name=name, settings=_table(values.get("settings", {}), f"{name}.settings"))


def _stage(entry: Settings) -> Stage:
    values = _checked(entry, Stage, "stages", required=("name",))
    name = _name(values["name"], "stages")
    grid = _table(values.get("grid", {}), f"{name}.grid")
    for key, points in grid.items():
        if not isinstance(points, list) or not points:
            raise ConfigError(f"stage {name}: grid {key!r} is {points!r}; use a list of values")
    seeds = values.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or not all(type(s) is int for s in seeds):
        raise ConfigError(f"stage {name}: seeds is {seeds!r}; use a list of whole numbers")
    if not isinstance(values.get("evaluate", False), bool):
        raise ConfigError(f"stage {name}: evaluate is {values['evaluate']!r}; use true or false")
    return Stage(
        name=name,
        settings=_table(values.get("settings", {}), f"{name}.settings"),
        grid={key: tuple(points) for key, points in grid.items()},
        seeds=tuple(seeds),
        best_of=str(values.get("best_of", "")),
        init_from=str(values.get("init_from", "")),
        variants=_strings(values.get("variants", []), f"stage {name}: variants"),
        evaluate=values.get("evaluate", False),
    )


def _evaluation(entry: Settings) -> StudyEvaluation:
    values = _checked(entry, StudyEvaluation, "evaluations", required=("name", "arguments"))
    name = _name(values["name"], "evaluations")
    arguments = _strings(values["arguments"], f"evaluation {name}: arguments")
    for option in ("--checkpoint", "--json"):
        if any(argument.partition("=")[0] == option for argument in arguments):
            raise ConfigError(f"evaluation {name} has {option}, which the study sets; leave it out")
    return StudyEvaluation(
        name=name,
        arguments=arguments,
        variants=_strings(values.get("variants", []), f"evaluation {name}: variants"),
        stages=_strings(values.get("stages", []), f"evaluation {name}: stages"),
    )


def _examples(entry: Settings) -> StudyExamples:
    values = _checked(entry, StudyExamples, "examples", required=("name", "arguments"))
    name = _name(values["name"], "examples")
    arguments = _strings(values["arguments"], f"examples {name}: arguments")
    if "--out" not in arguments[:-1]:
        raise ConfigError(f"examples {name} have no --out; name the file that the runs read")
    return StudyExamples(name=name, arguments=arguments)


def _mode(value: Any, metric: str) -> Mode:
    if value not in get_args(Mode):
        raise ConfigError(f"study.mode is {value!r:.80}; use 'min' or 'max'")
    if value == "min" and "accuracy" in metric:
        raise ConfigError(
            f"study.metric is {metric!r}, of which higher values are better; set mode = 'max'"
        )
    return value


def _check_references(study: Study) -> None:
    for kind, entries in (
        ("variant", study.variants), ("stage", study.stages), ("evaluation", study.evaluations),
        ("set of examples", study.examples),
    ):  # fmt: skip
        names = [entry.name for entry in entries]
        if double := {name for name in names if names.count(name) > 1}:
            raise ConfigError(
                f"a {kind} has the name of another, {sorted(double)[0]!r}; rename one"
            )
    variants = [variant.name for variant in study.variants]
    for entry in (*study.stages, *study.evaluations):
        for name in entry.variants:
            if name not in variants:
                raise ConfigError(
                    f"{entry.name}: no variant {name!r}{did_you_mean(name, variants)}"
                )
    stages = [stage.name for stage in study.stages]
    for evaluation in study.evaluations:
        for name in evaluation.stages:
            if name not in stages:
                raise ConfigError(
                    f"{evaluation.name}: no stage {name!r}{did_you_mean(name, stages)}"
                )
    earlier: dict[str, Stage] = {}
    for stage in study.stages:
        for key, name in (("best_of", stage.best_of), ("init_from", stage.init_from)):
            if name and name not in earlier:
                raise ConfigError(
                    f"stage {stage.name}: {key} is {name!r}; use an earlier stage"
                    f"{did_you_mean(name, list(earlier))}"
                )
        if stage.init_from:
            _check_start(stage, earlier[stage.init_from], variants)
        earlier[stage.name] = stage


def _check_start(stage: Stage, start: Stage, variants: Sequence[str]) -> None:
    """A run of `stage` must start from one run of `start`."""
    where = f"stage {stage.name}: init_from is {start.name!r}"
    if any(len(points) > 1 for points in start.grid.values()):
        raise ConfigError(f"{where}, which has a grid; use a stage with one run for every seed")
    if len(start.seeds) > 1 and (missing := sorted({*stage.seeds} - {*start.seeds})):
        raise ConfigError(f"{where}, which has no seed {missing[0]}; use its seeds")
    if missing_names := {*(stage.variants or variants)} - {*(start.variants or variants)}:
        raise ConfigError(f"{where}, which does not run {sorted(missing_names)[0]!r}")


def _checked(table: Any, kind: type, where: str, *, required: Sequence[str]) -> dict[str, Any]:
    known = list(kind.__dataclass_fields__)
    for key in _table(table, where):
        if key not in known:
            raise ConfigError(f"{where}: no key {key!r}{did_you_mean(key, known)}")
    for key in required:
        if key not in table:
            raise ConfigError(f"{where} has no {key!r}")
    return dict(table)


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} is {value!r:.80}; use a table")
    return dict(value)


def _tables(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or (where in ("variants", "stages") and not value):
        raise ConfigError(f"{where} is {value!r:.80}; use tables [[{where}]]")
    return value


def _strings(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise ConfigError(f"{where} is {value!r:.80}; use a list of strings")
    return tuple(value)


def _name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ConfigError(
            f"{where}: the name {value!r} is empty or has other characters than letters, digits, "
            "'_', '-' and '.'"
        )
    return value
