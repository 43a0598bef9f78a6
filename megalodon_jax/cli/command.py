"""Common parts of all commands of `megalodon`."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from megalodon_jax.config.run import COMPILATION_CACHE_GB, USER_CACHE


class Command(Protocol):
    """A parsed command."""

    def run(self) -> int:
        """Runs the command; returns the exit code of the process."""
        ...


@dataclass(frozen=True, kw_only=True)
class WithCompilationCache:
    """A command that keeps the programs that it compiles; `train` has a setting of the run."""

    compilation_cache: str = USER_CACHE
    """Directory of compiled programs, which the next call reads; `user`: $XDG_CACHE_HOME/megalodon,
    by default in ~/.cache; empty: none."""
    compilation_cache_gb: float = COMPILATION_CACHE_GB
    """Largest size of that directory in GB; 0: no limit."""

    def keep_programs(self) -> AbstractContextManager[None]:
        """A context in which compiled programs are kept and read."""
        # A local import: help and errors come without JAX.
        from megalodon_jax.compilation_cache import persistent_compilation_cache

        return persistent_compilation_cache(self.compilation_cache, self.compilation_cache_gb)
