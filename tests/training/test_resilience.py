"""Runs with skipped updates, spikes, changed settings, traces and a compilation cache."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest
from jax.profiler import ProfileData

from megalodon_jax.checkpoints import RunCheckpoints
from megalodon_jax.compilation_cache import persistent_compilation_cache, user_cache_dir
from megalodon_jax.config import TrainConfig
from megalodon_jax.config.run import step_range
from megalodon_jax.errors import ConfigError, DataError, TrainingError
from megalodon_jax.train_state import TrainState
from megalodon_jax.training import loop
from megalodon_jax.training.loop import train
from tests.faults.run_process import started_run


def lines_of(config: TrainConfig) -> list[dict[str, Any]]:
    text = Path(config.run_dir, "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def logged(config: TrainConfig, name: str) -> dict[int, Any]:
    return {line["step"]: line[name] for line in lines_of(config) if name in line}


def state_of(config: TrainConfig, step: int) -> TrainState:
    with RunCheckpoints(config.run_dir, read_only=True) as checkpoints:
        return checkpoints.restore(step, config).state


# A byte that the text has not.
UNSEEN = 0xFF


@contextmanager
def bad_batches(
    monkeypatch, *, infinite: tuple[int, ...] = (), unseen: tuple[int, ...] = (), start: int = 0
) -> Iterator[None]:
    """Infinite weights, or targets that the text never has, in some updates.

    Args:
      monkeypatch: of the test.
      infinite: numbers of the updates whose loss is not finite.
      unseen: numbers of the updates whose loss is high.
      start: the step from which the run starts.
    """
    stack, count = loop._stack, [start]

    def stack_badly(batches):
        count[0] += 1
        batch = stack(batches)
        if count[0] in infinite:
            return batch._replace(weights=np.full_like(batch.weights, np.inf))
        if count[0] in unseen:
            return batch._replace(targets=np.full_like(batch.targets, UNSEEN))
        return batch

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_stack", stack_badly)
        yield


@pytest.fixture
def watched(config) -> TrainConfig:
    """Eight updates, the last of which follow the first window of three finite ones."""
    return dataclasses.replace(
        config, steps=8, sample_tokens=0, keep_checkpoints=3, spike_window=3, spike_threshold=2.0,
        on_spike="skip",
    )  # fmt: skip


@pytest.mark.slow
def test_skipped_updates_are_counted_and_resuming_changes_nothing(watched, monkeypatch, capsys):
    with bad_batches(monkeypatch, infinite=(2, 3), unseen=(6,)):
        assert train(watched).step == 8
    out = capsys.readouterr().out
    assert "step 2: update skipped, loss is nan and gradient norm nan" in out
    assert "step 6: spike, loss is " in out
    assert logged(watched, "skipped_updates") == {1: 0, 2: 1, 3: 2, 4: 2, 5: 2, 6: 3, 7: 3, 8: 3}
    assert logged(watched, "spiked_updates")[8] == len(logged(watched, "spike_loss")) == 1
    assert logged(watched, "skipped_loss") == {2: "nan", 3: "nan"}
    complete = state_of(watched, 8)
    assert (int(complete.guard.skipped), int(complete.guard.spiked)) == (3, 1)
    for step in (6, 8):
        Path(watched.run_dir, "checkpoints", str(step)).rename(Path(watched.run_dir, f"k{step}"))
    # The window that was not full at step 3 is part of the checkpoint.
    with bad_batches(monkeypatch, unseen=(6,), start=3):
        train(dataclasses.replace(watched, resume=True))
    chex.assert_trees_all_equal(state_of(watched, 8), complete)
    # Two starts: what the first one did after step 3 was done again.
    assert logged(watched, "seconds_lost")[8] > 0.0
    names = ("start_up", "compilation", "steps", "data", "evaluation", "saving")
    assert all(logged(watched, f"seconds_{name}")[8] > 0.0 for name in names)
    assert " s in 2 starts: " in capsys.readouterr().out.splitlines()[-1]
    # A window of another length starts empty and keeps the counts.
    guard = state_of(dataclasses.replace(watched, spike_window=5), 8).guard
    assert guard.losses.shape == (5,)
    assert (int(guard.skipped), int(guard.spiked), int(guard.count)) == (3, 1, 0)


@pytest.mark.slow
def test_too_many_skipped_updates_in_a_row_end_the_run(config, monkeypatch):
    limited = dataclasses.replace(config, max_skipped_updates=1)
    with (
        bad_batches(monkeypatch, infinite=(5, 6)),
        pytest.raises(
            TrainingError,
            match=r"step 6; 2 updates in a row were skipped, max_skipped_updates is 1; "
            r"the newest checkpoint is step 3",
        ),
    ):
        train(limited)
    assert not Path(config.run_dir, "checkpoints", "6").exists()


@pytest.mark.slow
@pytest.mark.parametrize("on_spike", ["warn", "stop"])
def test_a_spike_warns_or_stops(on_spike, watched, monkeypatch, capsys):
    nervous = dataclasses.replace(watched, on_spike=on_spike)
    with bad_batches(monkeypatch, unseen=(6,)):
        if on_spike == "stop":
            with pytest.raises(TrainingError, match=r"^spike: loss is .* at step 6, and on_spike"):
                train(nervous)
            return
        train(nervous)
    assert logged(nervous, "spiked_updates")[8] >= 1
    assert logged(nervous, "skipped_updates")[8] == 0
    assert "update applied" in capsys.readouterr().out


@pytest.mark.slow
def test_changed_settings_are_logged_and_accepted(finished, capsys):
    optim = dataclasses.replace(finished.optim, lr=3e-3, schedule="cosine")
    train(dataclasses.replace(finished, optim=optim, steps=7, resume=True))
    out = capsys.readouterr().out
    assert "optim.lr was 0.01 and is 0.003 from step 7 on" in out
    assert "optim.schedule was 'linear' and is 'cosine' from step 7 on" in out
    assert logged(finished, "changed_settings") == {
        6: {"steps": [6, 7], "optim.lr": [1e-2, 3e-3], "optim.schedule": ["linear", "cosine"]}
    }


def test_changed_data_names_the_way_out(finished):
    data = dataclasses.replace(finished.data, batch_size=4)
    with pytest.raises(DataError, match=r"batch_size was 2 and is 4.*--init_from"):
        train(dataclasses.replace(finished, data=data, resume=True))


# As an error the warning of jaxlib's type ends the process.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:builtin type event_stats:DeprecationWarning")
def test_profiled_steps_are_in_a_trace(finished):
    train(dataclasses.replace(finished, steps=9, resume=True, profile_steps="8:9"))
    (path,) = Path(finished.run_dir, "profile").rglob("*.xplane.pb")
    profile = ProfileData.from_file(str(path))
    # Read inside the loops: an event does not keep its plane alive.
    steps = [
        dict(event.stats).get("step_num")
        for plane in profile.planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    ]
    assert steps == [8]


@pytest.mark.parametrize("text", ["10", "3:3", "0:4", "a:b", "5:2", "1:2:3"])
def test_a_wrong_range_of_steps_is_rejected(text):
    with pytest.raises(ConfigError, match="profile_steps is"):
        TrainConfig(profile_steps=text)


def test_a_range_of_steps_is_read():
    assert (step_range(""), step_range("10:13")) == (None, (10, 13))


def test_the_cache_directory_and_who_chooses_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = jax.config.jax_compilation_cache_dir

    def directory(setting: str) -> str | None:
        with persistent_compilation_cache(setting):
            return jax.config.jax_compilation_cache_dir

    # The tests' own cache was chosen before.
    assert directory("user") == directory("") == before
    assert directory(str(tmp_path / "named")) == str(tmp_path / "named")
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ConfigError, match=r"compilation_cache .* cannot be written"):
        directory(str(blocked))
    assert jax.config.jax_compilation_cache_dir == before
    assert user_cache_dir().is_relative_to(tmp_path / "cache" / "megalodon")


def test_the_cache_has_a_limit_and_loses_half_written_programs(tmp_path):
    def compile_number(number: int) -> None:
        jax.jit(lambda x: x * number + 1).lower(jax.numpy.ones(3)).compile()

    def programs() -> set[str]:
        return {path.name for path in tmp_path.glob("*-cache")}

    with persistent_compilation_cache(str(tmp_path)):
        compile_number(2)
    first = programs()
    assert len(first) >= 1
    size = sum((tmp_path / name).stat().st_size for name in first)
    # A killed process leaves half of a program, without the time of its last use.
    (tmp_path / "half-cache").write_bytes(b"half")
    with persistent_compilation_cache(str(tmp_path), 1.5 * size / 1e9):
        assert programs() == first
        for number in range(3, 6):
            compile_number(number)
    assert programs()
    assert not programs() & first
    assert sum((tmp_path / name).stat().st_size for name in programs()) <= 1.5 * size
    with persistent_compilation_cache(str(tmp_path), 0.0):
        assert jax.config.jax_compilation_cache_max_size == -1


COUNT_MISSES = """
import atexit, collections, jax
events = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: events.update([name.split("/")[-1]]))
atexit.register(lambda: print("EVENTS", events["cache_hits"], events["cache_misses"], flush=True))
"""


@pytest.mark.slow
def test_a_second_process_compiles_nothing(config, tmp_path):
    counts = []
    for resume in ((), ("--resume",)):
        with started_run(
            config, "", "--sample_tokens", "4", *resume, changes=COUNT_MISSES,
            environment={"XDG_CACHE_HOME": str(tmp_path / "cache")},
        ) as run:  # fmt: skip
            assert run.end()[0] == 0, run.output()
            last = run.output().strip().splitlines()[-1]
        counts.append(tuple(map(int, last.removeprefix("EVENTS ").split())))
        # The second process does the last three updates again.
        shutil.rmtree(Path(config.run_dir, "checkpoints", "6"))
    (_, compiled), (read, compiled_again) = counts
    assert compiled > 10
    assert read > 10
    assert compiled_again == 0


HANG = """
make_train_step = loop.make_train_step
def make_hanging(*arguments, **options):
    step, count = make_train_step(*arguments, **options), []
    def hang(*arguments):
        count.append(None)
        if len(count) == 4:
            import hashlib
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)
        return step(*arguments)
    return hang
loop.make_train_step = make_hanging
"""


@pytest.mark.slow
def test_a_step_that_hangs_ends_the_process(config, compilation_cache_dir):
    with started_run(config, compilation_cache_dir, "--watchdog_seconds", "2", changes=HANG) as run:
        code, _ = run.end()
        out = run.output()
    stacks = Path(config.run_dir, "stacks_0.txt").read_text()
    assert code == 75
    assert "no progress for 2 s in step 4" in out
    for text in (out, stacks):
        # The stack of the main thread, in compiled code.
        assert "in hang" in text
        assert "in _train_step" in text
    assert Path(config.run_dir, "checkpoints", "3").is_dir()
