"""The persistent cache of compiled programs: a restart reads them instead of compiling."""

import contextlib
import hashlib
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
import jax
from jax.experimental.compilation_cache import compilation_cache

from megalodon_jax.config.run import COMPILATION_CACHE_GB, USER_CACHE
from megalodon_jax.errors import ConfigError

# JAX keeps programs of more than a second by default; a restart would compile all the others.
_KEEP_EVERYTHING = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
_LOCK_SECONDS = 10.0


@contextmanager
def persistent_compilation_cache(
    setting: str, max_gb: float = COMPILATION_CACHE_GB
) -> Iterator[None]:
    """Keeps every program that is compiled inside, and reads those that are there.

    A directory that JAX was given before (`JAX_COMPILATION_CACHE_DIR`) takes precedence over the
    user's cache, and is used as JAX is configured. The directory may be removed at any time.

    Args:
      setting: a directory; "user": `user_cache_dir()`; empty: no cache.
      max_gb: largest size in 1e9 bytes; when a program is added, those that were not used for the
        longest time are removed. 0: no limit.

    Raises:
      ConfigError: the named directory cannot be written.
    """
    directory = _directory(setting)
    if directory is None:
        yield
        return
    changed = {
        "jax_compilation_cache_dir": str(directory),
        "jax_compilation_cache_max_size": int(max_gb * 1e9) if max_gb else -1,
        **_KEEP_EVERYTHING,
    }
    if max_gb:
        _remove_unfinished(directory)
    before = {name: getattr(jax.config, name) for name in changed}
    try:
        _configure(changed)
        yield
    finally:
        _configure(before)


def user_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/megalodon/compiled/<machine>`, below `~/.cache` by default.

    Programs for a CPU use the instructions of the machine that compiled them, and a home directory
    may be shared by machines of several kinds.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return base / "megalodon" / "compiled" / _machine()


def _machine() -> str:
    features = ""
    if (cpu := Path("/proc/cpuinfo")).exists():
        lines = cpu.read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    digest = hashlib.sha256(f"{platform.processor()}{features}".encode()).hexdigest()
    return f"{platform.machine()}_{digest[:8]}"


def _directory(setting: str) -> Path | None:
    if not setting or (setting == USER_CACHE and jax.config.jax_compilation_cache_dir):
        return None
    directory = user_cache_dir() if setting == USER_CACHE else Path(setting).expanduser()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if setting != USER_CACHE:
            raise ConfigError(
                f"compilation_cache {setting!r} cannot be written: {error}; name another "
                "directory, or leave it empty for no cache"
            ) from error
        print(f"compiled programs are not kept: {error}", file=sys.stderr)
        return None
    return directory


def _remove_unfinished(directory: Path) -> None:
    """Removes programs that a killed process has written in part.

    JAX does not replace an entry that exists: every restart would fail to read it and compile. With
    a size limit the time of the last use is written after the program, under JAX's lock.
    """
    lock = filelock.FileLock(directory / ".lockfile", timeout=_LOCK_SECONDS)
    # If it fails, the next start tries again.
    with contextlib.suppress(OSError, filelock.Timeout), lock:
        for program in directory.glob("*-cache"):
            if not program.with_name(f"{program.name.removesuffix('-cache')}-atime").exists():
                program.unlink()


def _configure(values: dict[str, object]) -> None:
    for name, value in values.items():
        jax.config.update(name, value)
    # The cache is opened once, with the directory of that moment.
    compilation_cache.reset_cache()
