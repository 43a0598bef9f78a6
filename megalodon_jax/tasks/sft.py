"""Supervised fine-tuning: predict the responses of prompts, or the assistant of conversations."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megalodon_jax.config import DataConfig, TextSource, TrainConfig
from megalodon_jax.errors import ConfigError
from megalodon_jax.evaluation.summary import Evaluation, summarize
from megalodon_jax.loss import LossOutput
from megalodon_jax.tasks.language import LanguageModeling, check_vocabulary

if TYPE_CHECKING:
    from megalodon_jax.data.examples import ExampleFormat
    from megalodon_jax.data.loader import Loader
    from megalodon_jax.data.tokenizer import Tokenizer


class SupervisedFineTuning(LanguageModeling):
    """Cross-entropy of the targets of responses; the methods are documented in `Task`.

    The loss is the mean over all such targets of the global batch, of all its accumulated parts.
    """

    def open_loaders(
        self, config: TrainConfig, tokenizer: "Tokenizer", *, rows: Sequence[int], num_shards: int
    ) -> "tuple[Loader, dict[str, Loader]]":
        """Packed rows of examples, and those of the held-out sets, of which there may be none."""
        from megalodon_jax.data.loader import make_loader
        from megalodon_jax.data.open_source import heldout_names

        check_vocabulary(tokenizer, config)
        data, rows = _with_whole_records(config.data), tuple(rows)
        examples = example_format(config, tokenizer)
        training = make_loader(
            data,
            tokenizer,
            "train",
            rows=rows,
            default_shards=num_shards,
            repeat=True,
            examples=examples,
        )
        return training, {
            name: make_loader(
                data, tokenizer, "heldout", rows=rows, repeat=False, name=name, examples=examples
            )
            for name in heldout_names(data)
        }

    def metric(self, sums: Sequence[LossOutput], num_bytes: int | None) -> Evaluation:
        """Loss and perplexity per target of a response; bits per byte are NaN."""
        del num_bytes
        return summarize(sums, None)


def example_format(config: TrainConfig, tokenizer: "Tokenizer") -> "ExampleFormat":
    """How the records of a run become examples.

    Raises:
      DataError: the chat template cannot be read.
    """
    from megalodon_jax.data.chat_template import ChatTemplate
    from megalodon_jax.data.examples import ExampleFormat

    settings = config.sft
    if settings.chat_template:
        template = ChatTemplate.load(settings.chat_template)
    else:
        template = ChatTemplate.of_tokenizer(tokenizer)
    return ExampleFormat(template, settings.max_length or config.data.seq_len, settings.too_long)


def _with_whole_records(data: DataConfig) -> DataConfig:
    """The data whose documents are whole records.

    Raises:
      ConfigError: a file is not .jsonl, or a source has no files.
    """
    from megalodon_jax.data.find_files import require_json_lines
    from megalodon_jax.data.text_files import WHOLE_RECORD

    tables: tuple[TextSource, ...] = (*(data.sources or (data,)), *data.heldout_sets)
    for table in tables:
        if table.kind != "files":
            raise ConfigError(
                f"task is 'sft' and a source of the data is {table.kind!r}; examples are read from "
                ".jsonl files, named in data.files"
            )
        require_json_lines(table.files)
    require_json_lines(data.heldout_files)
    return dataclasses.replace(
        data,
        text_field=WHOLE_RECORD,
        sources=tuple(_whole(table) for table in data.sources),
        heldout_sets=tuple(_whole(table) for table in data.heldout_sets),
    )


def _whole[T: TextSource](table: T) -> T:
    from megalodon_jax.data.text_files import WHOLE_RECORD

    return dataclasses.replace(table, text_field=WHOLE_RECORD)
