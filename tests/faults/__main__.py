"""Runs the long forms of all fault harnesses, one after the other, and prints a table.

    python -m tests.faults --all --seed 0
    python -m tests.faults --only kills storage

Each is a command of its own too. About an hour on two cores; `storage` needs root.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Form(NamedTuple):
    """The long form of one harness: what it does to a run, its command, more environment."""

    what: str
    arguments: tuple[str, ...]
    environment: dict[str, str]


def forms(seed: int) -> dict[str, Form]:
    """All harnesses by name."""
    pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
    seeded = ("--seed", str(seed))
    return {
        "kills": Form(
            "SIGKILL at random moments and chosen points",
            ("-m", "tests.faults.kills", "--count", "110", *seeded),
            {},
        ),
        "storage": Form(
            "full, read-only, immutable and removed directories",
            ("-m", "tests.faults.storage"),
            {},
        ),
        "corruptions": Form(
            "checkpoints with flipped bits, truncated, removed and swapped files",
            ("-m", "tests.faults.corruptions", "--count", "400", *seeded),
            {},
        ),
        "hostile_files": Form(
            "files that attack their reader",
            ("-m", "tests.faults.hostile_files", "--count", "400", *seeded),
            {},
        ),
        "configs": Form(
            "random configurations, of which each trains or is refused",
            (*pytest, "tests/faults/test_configs.py"),
            {"MEGALODON_RANDOM_CONFIGS": "40"},
        ),
        "signals": Form(
            "signals in every phase of a run", (*pytest, "tests/faults/test_signals.py"), {}
        ),
        "owners": Form(
            "two owners, failed saves of one and two processes",
            (*pytest, "tests/faults/test_checkpoints.py"),
            {},
        ),
    }


def main() -> int:
    """Prints the output of each form, then the table; the exit code is 1 if one found a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="run every form")
    parser.add_argument("--only", nargs="+", choices=list(forms(0)), default=[], metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.all == bool(options.only):
        parser.error(f"give --all, or --only with some of {', '.join(forms(0))}")
    rows = []
    for name, form in forms(options.seed).items():
        if options.only and name not in options.only:
            continue
        print(f"--- {name}: {form.what}", flush=True)
        started = time.monotonic()
        code, last = _run(form)
        verdict = "no fault" if code == 0 else f"FAULT (exit code {code})"
        rows.append((name, verdict, f"{time.monotonic() - started:.0f} s", last))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    print()
    for *cells, last in rows:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        print("  ".join((*padded, last)))
    return int(any(not row[1].startswith("no fault") for row in rows))


def _run(form: Form) -> tuple[int, str]:
    """The exit code, and the line that has the counts."""
    environment = {"JAX_PLATFORMS": "cpu", **os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, *form.arguments],
        cwd=ROOT, env={**environment, **form.environment}, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        counted = ""
        for line in process.stdout:
            print(line, end="", flush=True)
            if any(word in line for word in (" faults", " restored silently", " passed in ")):
                counted = line.strip().strip("= ")
    return process.returncode, counted


if __name__ == "__main__":
    sys.exit(main())
