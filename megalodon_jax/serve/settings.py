"""The settings of a server. Importing this module needs no JAX and no web framework."""

import os
from dataclasses import dataclass
from pathlib import Path

import tyro

from megalodon_jax.errors import ConfigError

KEY_VARIABLE = "MEGALODON_API_KEY"
LOOPBACK_HOSTS = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Addresses, keys and limits of a server.

    Raises:
      ConfigError: a number is out of range.
    """

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0: all of the machine's, which needs an API key."""
    port: int = 8000
    """Port to listen at; 0: a free one, which is printed."""
    api_key_file: str = ""
    """File with an API key a line; without it the key in the environment variable
    MEGALODON_API_KEY, if set."""
    model_name: str = ""
    """Name of the model in calls; by default the last part of the path."""
    chat_template: str = ""
    """`plain`, or a Jinja file; by default the tokenizer's own."""
    slots: int = 16
    """Most answers that are computed at the same time."""
    max_waiting: int = 256
    """Most requests in the queue; more are answered with 429."""
    max_prompt_tokens: int = 1_000_000
    """Most tokens of a prompt."""
    max_answer_tokens: int = 4096
    """Most tokens of an answer; also the number of a chat's answer that names none."""
    max_body_bytes: int = 16_000_000
    """Largest body of a call; larger ones are answered with 413."""
    max_sessions: int = 1000
    """Most sessions in memory; the least recently used ones are dropped."""
    session_dir: str = ""
    """Directory that keeps sessions; they then outlive the server and the limit."""
    shutdown_seconds: float = 30.0
    """Seconds that running answers have after SIGTERM or Ctrl-C."""
    cors_origin: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Origin of web pages that may call the server from a browser; may be repeated."""

    def __post_init__(self) -> None:
        least = {
            "slots": 2, "max_waiting": 1, "max_prompt_tokens": 1, "max_answer_tokens": 1,
            "max_body_bytes": 1, "max_sessions": 1, "shutdown_seconds": 0, "port": 0,
        }  # fmt: skip
        faults = [
            f"{name} is {getattr(self, name)}; use {low} or more"
            for name, low in least.items()
            if not getattr(self, name) >= low
        ]
        if self.port > 65535:
            faults.append(f"port is {self.port}; use 0 to 65535")
        if faults:
            raise ConfigError("; ".join(faults))

    def api_keys(self) -> tuple[str, ...]:
        """The keys that give access; empty: everybody has it.

        Raises:
          ConfigError: the file cannot be read or has no key, or an address that others can reach
            has no key.
        """
        if self.api_key_file:
            try:
                lines = Path(self.api_key_file).expanduser().read_text("utf-8").split("\n")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"cannot read --api_key_file: {error}") from error
            keys = [line.strip() for line in lines]
        else:
            keys = [os.environ.get(KEY_VARIABLE, "").strip()]
        found = tuple(key for key in keys if key)
        if self.api_key_file and not found:
            raise ConfigError(f"--api_key_file {self.api_key_file} has no key")
        if not found and self.host not in LOOPBACK_HOSTS:
            raise ConfigError(
                f"host {self.host} can be reached by others; give an --api_key_file, or set "
                f"{KEY_VARIABLE}"
            )
        return found
