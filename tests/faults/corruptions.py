"""Random corruptions of a checkpoint: none may be restored silently.

    python -m tests.faults.corruptions --count 400

corrupts copies of a run of two checkpoints. Every second corruption is the flip of a single bit,
the others are truncations, removals, swaps of two files of a checkpoint or of two checkpoints, a
file of the other checkpoint under a new name, and an exchange of the checkpoints' names.
"""

import argparse
import collections
import contextlib
import dataclasses
import io
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from megalodon_jax.checkpoints import RunCheckpoints, verify_run
from megalodon_jax.config import TrainConfig
from megalodon_jax.errors import CheckpointError
from megalodon_jax.train_state import init_state

STEPS = (3, 6)


def make_run(config: TrainConfig) -> None:
    """Saves two checkpoints that differ in every array."""
    _, state = init_state(config)
    with RunCheckpoints(config.run_dir, keep=2) as checkpoints:
        for step in STEPS:
            checkpoints.save(
                jax.tree.map(lambda leaf, by=step: leaf + by, state),
                loader_state={"version": 1, "position": step},
                config=config,
                tokenizer_fingerprint="bytes",
            )


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


class Corruption:
    """The corruptions of a run's newest checkpoint; each returns what it did, or None for nothing.

    Nothing was done if the content is the same as before.
    """

    def __init__(self, run_dir: Path, rng: np.random.Generator) -> None:
        self.older, self.newest = (run_dir / "checkpoints" / str(step) for step in STEPS)
        self.rng = rng

    def choose(self, checkpoint: Path) -> Path:
        files = files_of(checkpoint)
        return files[self.rng.integers(len(files))]

    def flip(self) -> str | None:
        path = self.choose(self.newest)
        content = bytearray(path.read_bytes())
        if not content:
            return None
        bit = int(self.rng.integers(8 * len(content)))
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        return f"bit {bit} of {path.name}"

    def truncate(self) -> str | None:
        path = self.choose(self.newest)
        content = path.read_bytes()
        path.write_bytes(content[: self.rng.integers(len(content))] if content else content)
        return f"truncated {path.name}" if content else None

    def remove(self) -> str | None:
        path = self.choose(self.newest)
        path.unlink()
        return f"removed {path.name}"

    def swap(self) -> str | None:
        return self._swap(self.choose(self.newest), self.choose(self.newest))

    def swap_between_steps(self) -> str | None:
        path = self.choose(self.newest)
        other = self.older / path.relative_to(self.newest)
        return self._swap(path, other if other.exists() else self.choose(self.older))

    def add(self) -> str | None:
        path = self.choose(self.older)
        target = self.newest / path.relative_to(self.older).with_name(f"{path.name}_2")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
        return f"added {target.name}"

    def exchange_steps(self) -> str | None:
        aside = self.newest.with_name("aside")
        self.newest.rename(aside)
        self.older.rename(self.newest)
        aside.rename(self.older)
        return "exchanged the steps"

    def _swap(self, first: Path, second: Path) -> str | None:
        a, b = first.read_bytes(), second.read_bytes()
        first.write_bytes(b)
        second.write_bytes(a)
        return f"swapped {first.name} and {second.name}" if a != b else None

    def kinds(self) -> list[Callable[[], str | None]]:
        return [
            self.truncate, self.remove, self.swap, self.swap_between_steps, self.add,
            self.exchange_steps,
        ]  # fmt: skip


def corrupt(run_dir: Path, number: int, rng: np.random.Generator) -> tuple[str, str] | None:
    """Applies corruption `number`; returns its kind and what was done, None if nothing was."""
    corruption = Corruption(run_dir, rng)
    others = corruption.kinds()
    kind = corruption.flip if number % 2 == 0 else others[number // 2 % len(others)]
    done = kind()
    return None if done is None else (kind.__name__, done)


def passes(config: TrainConfig) -> bool:
    """Whether the newest checkpoint restores, or `megalodon verify` finds it good."""
    with RunCheckpoints(config.run_dir, read_only=True) as checkpoints:
        try:
            checkpoints.restore(STEPS[-1], config)
        except CheckpointError:
            report = {entry.step: entry.state for entry in verify_run(config.run_dir)}
            return report[STEPS[-1]] == "good"
    return True


def run(config: TrainConfig, count: int, *, seed: int = 0) -> tuple[collections.Counter, list[str]]:
    """Corrupts `count` copies of a new run in `config.run_dir`.

    Returns:
      The number of corruptions of each kind, and those that passed.
    """
    make_run(config)
    original = Path(config.run_dir)
    rng = np.random.default_rng(seed)
    counts: collections.Counter = collections.Counter()
    passed = []
    number = 0
    while number < count:
        copy = original.with_name("copy")
        shutil.copytree(original, copy)
        if (done := corrupt(copy, number, rng)) is not None:
            kind, what = done
            counts[kind] += 1
            number += 1
            with contextlib.redirect_stderr(io.StringIO()):
                if passes(dataclasses.replace(config, run_dir=str(copy))):
                    passed.append(what)
        shutil.rmtree(copy)
    return counts, passed


def main() -> int:
    """Prints the counts; the exit code is 1 if a corruption passed."""
    from tests.fixtures_runs import TINY_MODEL

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(model=TINY_MODEL, run_dir=f"{folder}/run")
        counts, passed = run(config, options.count, seed=options.seed)
    print(f"{sum(counts.values())} corruptions: {dict(counts)}; {len(passed)} restored silently")
    for what in passed:
        print(f"restored silently: {what}")
    return 1 if passed else 0


if __name__ == "__main__":
    sys.exit(main())
