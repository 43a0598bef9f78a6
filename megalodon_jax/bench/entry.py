"""Runs one benchmark from the command line of its own module (`python -m`)."""

from collections.abc import Callable, Sequence


def run_command[T](
    run: Callable[[T], int], options: type[T], prog: str, argv: Sequence[str] | None
) -> int:
    """Parses options and runs a benchmark; returns the process's exit code.

    Args:
      run: the benchmark.
      options: the class of its options.
      prog: the command in help and errors.
      argv: arguments; None: those of the process.
    """
    import tyro

    parsed = tyro.cli(
        options,
        args=argv,
        prog=prog,
        use_underscores=True,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return run(parsed)
