"""The tokenizer's files inside a run directory, so that a copy of the run works elsewhere.

`<run_dir>/tokenizer/tokenizer.json` (with `tokenizer_config.json` if there is one) or
`tokenizer.model`; checkpoints refer to it by this relative path.
"""

import sys

from megalodon_jax.checkpoints.directory import Directory, open_directory
from megalodon_jax.config import TrainConfig
from megalodon_jax.data.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer
from megalodon_jax.errors import CheckpointError, DataError
from megalodon_jax.parallel.distributed import is_main
from megalodon_jax.storage.files import exists
from megalodon_jax.storage.location import AnyPath, as_path

FOLDER = "tokenizer"


def relative_path(tokenizer: Tokenizer) -> str | None:
    """Where a run keeps a tokenizer; None: it has no file."""
    name = next((name for name in tokenizer.files() if name in TOKENIZER_FILES), None)
    return None if name is None else f"{FOLDER}/{name}"


def write_tokenizer(run: Directory, tokenizer: Tokenizer) -> None:
    """Writes a tokenizer's files into a run directory.

    Raises:
      CheckpointError: they cannot be written.
    """
    files = tokenizer.files()
    if not files:
        return
    folder = run.child(FOLDER)
    try:
        folder.make()
        for name in folder.names():
            if name not in files:
                folder.remove(name)
        for name, content in files.items():
            folder.write(name, content)
    except OSError as error:
        raise CheckpointError(f"the tokenizer cannot be written to {folder}: {error}") from error


def stored_tokenizer(run_dir: str | AnyPath, path: object) -> str | None:
    """The tokenizer file inside a run directory; None if it has none.

    Args:
      run_dir: the run's directory.
      path: its relative path, as a checkpoint says.
    """
    known = {f"{FOLDER}/{name}" for name in TOKENIZER_FILES}
    if not isinstance(path, str) or path not in known:
        return None
    stored = as_path(run_dir) / path
    return str(stored) if exists(stored) else None


def load_run_tokenizer(config: TrainConfig) -> Tokenizer:
    """The tokenizer of a run: `data.tokenizer`; a resumed run whose file is gone has its own copy.

    Raises:
      DataError: the file cannot be read.
    """
    spec = config.data.tokenizer
    resumes = config.resume or config.auto_resume
    if spec != "bytes" and resumes and not exists(as_path(spec).expanduser()):
        names = open_directory(config.run_dir).child(FOLDER).names()
        for name in TOKENIZER_FILES:
            if name in names:
                stored = str(as_path(config.run_dir) / FOLDER / name)
                if is_main():
                    print(f"{spec} does not exist; using {stored}", file=sys.stderr)
                return load_tokenizer(stored)
        raise DataError(f"tokenizer {spec} does not exist, and {config.run_dir} has no copy of it")
    return load_tokenizer(spec)
