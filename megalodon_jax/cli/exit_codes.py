"""Exit codes of the `megalodon` command.

0 done (also after SIGTERM with a checkpoint saved), 1 the command failed, 2 the command or the
configuration is wrong, 130 stopped by Ctrl-C.
"""

import signal

from megalodon_jax.errors import ConfigError


def exit_code(error: BaseException) -> int:
    """The exit code of a process that ends with this error."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    return 2 if isinstance(error, ConfigError) else 1
