"""Texts as bytes: their class, and the class of pairs of them."""

from pathlib import Path

import numpy as np

from megalodon_jax.config import TrainConfig
from megalodon_jax.errors import DataError
from megalodon_jax.tasks.classification import Classification, ExampleSets, ModelNeeds
from megalodon_jax.tasks.images import tfds_heldout_split


class TextTask(Classification):
    """The class of a text from its bytes: folders of files, or lines of a .jsonl file.

    A line is {"text": ..., "label": ...}; a folder has a folder of files for each class.
    """

    fields: tuple[str, ...] = ("text",)

    def example_sets(self, config: TrainConfig) -> ExampleSets:
        """The texts of `examples.path`, and those of `heldout_path` or a part of the former."""
        from megalodon_jax.data.example_sets.texts import TextExamples, split_files

        settings = config.examples
        if settings.tfds_name:
            return self._tfds(config)
        files, classes = self._find(settings.path, settings.classes)
        if settings.heldout_path:
            heldout, _ = self._find(settings.heldout_path, classes)
            parts = {"train": files, "heldout": heldout}
        else:
            by_order = settings.heldout_by == "order"
            parts = split_files(files, config.data.heldout_fraction, by_order=by_order)
        train, heldout = (TextExamples(parts[name], classes) for name in ("train", "heldout"))
        return ExampleSets(train, {"": heldout})

    def _find(self, path: str, classes: tuple[str, ...]):
        from megalodon_jax.data.example_sets.texts import (
            find_labelled_files,
            read_labelled_lines,
        )

        if Path(path).suffix == ".jsonl":
            return read_labelled_lines(path, classes, fields=self.fields)
        return find_labelled_files(path, classes)

    def _tfds(self, config: TrainConfig) -> ExampleSets:
        from megalodon_jax.data.example_sets.texts import byte_document
        from megalodon_jax.data.example_sets.tfds import TfdsExamples

        settings = config.examples
        splits = ("train", tfds_heldout_split(config))
        train, heldout = (
            TfdsExamples(
                settings.tfds_name, split, directory=settings.tfds_dir, transform=byte_document
            )
            for split in splits
        )
        return ExampleSets(train, {"": heldout})

    def needs(self, config: TrainConfig) -> ModelNeeds:
        """257 tokens: the bytes and eos."""
        from megalodon_jax.data.example_sets.texts import VOCAB_SIZE

        del config
        return ModelNeeds("tokens", VOCAB_SIZE)

    def read_file(self, path: Path, config: TrainConfig) -> list[tuple[np.ndarray, ...]]:
        """The whole file, one document."""
        from megalodon_jax.data.example_sets.texts import byte_document

        del config
        try:
            return [(byte_document(path.read_bytes()),)]
        except OSError as error:
            raise DataError(f"cannot read {path}: {error}") from error


class RetrievalTask(TextTask):
    """Whether two texts belong together: lines {"text1": ..., "text2": ..., "label": ...}."""

    documents_per_example = 2
    fields = ("text1", "text2")

    def _find(self, path: str, classes: tuple[str, ...]):
        if Path(path).suffix != ".jsonl":
            raise DataError(
                f"{path or 'examples.path'} is no .jsonl file; pairs are lines with text1, text2 "
                "and label"
            )
        return super()._find(path, classes)

    def read_file(self, path: Path, config: TrainConfig) -> list[tuple[np.ndarray, ...]]:
        """The pairs of a .jsonl file; a label is not needed."""
        import json

        from megalodon_jax.data.example_sets.texts import byte_document

        del config
        pairs = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                record = json.loads(line)
                texts = [record[field].encode("utf-8") for field in self.fields]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(f"{path}, line {number}: needs text1 and text2; {error}") from error
            pairs.append(tuple(map(byte_document, texts)))
        return pairs
