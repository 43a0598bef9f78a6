"""Exit codes of the `megalodon` command.

0 done, 1 the command failed, 2 the command or the configuration is wrong, 75 the watchdog ended a
process that hung (`training.watchdog`). A run that a signal stopped before its end: 130 after
Ctrl-C (SIGINT), 143 after SIGTERM, with a checkpoint saved unless the last line says otherwise.
"""

import signal

from megalodon_jax.errors import ConfigError


def signal_exit_code(number: signal.Signals | None) -> int:
    """The exit code of a run that this signal stopped; 0 if none did."""
    return 0 if number is None else 128 + number


def exit_code(error: BaseException) -> int:
    """The exit code of a process that ends with this error."""
    if isinstance(error, KeyboardInterrupt):
        return signal_exit_code(signal.SIGINT)
    return 2 if isinstance(error, ConfigError) else 1
