"""Configuration of supervised fine-tuning (task = "sft")."""

from dataclasses import dataclass
from typing import Literal

from megalodon_jax.config.checks import check
from megalodon_jax.config.ranges import Interval, LocalPath


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Supervised fine-tuning on .jsonl records: prompt and response, or messages."""

    chat_template: LocalPath = ""
    """Chat template of records with `messages`: `plain`, or a Jinja file; empty: that of the
    tokenizer's files."""
    max_length: Interval = 0
    """Most tokens of an example; 0: `data.seq_len`."""
    too_long: Literal["drop", "truncate"] = "drop"
    """Examples of more tokens are left out, or lose their end; both are counted in the metrics."""

    def __post_init__(self) -> None:
        check(self, "sft")
