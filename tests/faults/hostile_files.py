"""Reads hostile files of every kind that users hand to this package, and reports what they did.

    python -m tests.faults.hostile_files --count 200

No file may execute code, crash or hang the interpreter, take much memory, or end in another error
than this package's. Exit code 1 if one does. `--count` is the number of random mutations, in
addition to the crafted files.
"""

import argparse
import collections
import sys
import tempfile
from pathlib import Path

from tests.faults.hostile import Hostile, Runner
from tests.faults.hostile_folders import huggingface_folders
from tests.faults.hostile_tables import config_files, released_folders, safetensors_files
from tests.faults.hostile_texts import text_files, tokenizer_files
from tests.faults.hostile_torch import torch_files

# Kinds of files with random mutations: torch, safetensors, config, two tokenizers, gzip, parquet.
NUM_MUTATED = 7


def all_files(folder: Path, random_count: int, seed: int = 0) -> list[Hostile]:
    """All crafted files, and about `random_count` random mutations."""
    each = -(-random_count // NUM_MUTATED)
    return [
        *torch_files(folder, each, seed),
        *safetensors_files(each, seed),
        *released_folders(),
        *huggingface_folders(),
        *config_files(each, seed),
        *tokenizer_files(each, seed),
        *text_files(each, seed),
    ]


def main() -> int:
    """Runs the long form."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="random mutations")
    parser.add_argument("--seed", type=int, default=0, help="seed of the mutations")
    parser.add_argument("--only", default="", help="kind of file, such as torch")
    parser.add_argument("--verbose", action="store_true", help="print every verdict")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = all_files(folder, options.count, options.seed)
        files = [file for file in files if options.only in ("", file.kind)]
        verdicts = Runner(folder / "files").run(files)
    for verdict in verdicts:
        if verdict.is_fault or options.verbose:
            print("FAULT" if verdict.is_fault else "fine ", verdict)
    kinds = collections.Counter(verdict.file.kind for verdict in verdicts)
    outcomes = collections.Counter(verdict.outcome for verdict in verdicts)
    faults = sum(verdict.is_fault for verdict in verdicts)
    print(f"{len(verdicts)} files ({_listed(kinds)}): {_listed(outcomes)}; {faults} faults")
    print(
        f"largest extra memory {max(v.extra_bytes for v in verdicts) / 1e6:.0f} MB, "
        f"longest {max(v.seconds for v in verdicts):.1f} s"
    )
    return int(faults > 0)


def _listed(counts: collections.Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


if __name__ == "__main__":
    sys.exit(main())
