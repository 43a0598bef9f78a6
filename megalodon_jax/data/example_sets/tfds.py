"""Labelled examples of tensorflow-datasets sets that were prepared as array_record files."""

from collections.abc import Callable
from typing import Any

import numpy as np

from megalodon_jax.data.example_sets.arrays import TransformedExamples
from megalodon_jax.data.sources import digest_of
from megalodon_jax.errors import DataError

# The features of an example and the splits, by the name of the set.
INPUTS = {
    "cifar10": "image", "imagenet2012": "image", "speech_commands": "audio", "imdb_reviews": "text",
}  # fmt: skip
HELDOUT_SPLITS = {
    "cifar10": ("test", "test"),
    "imagenet2012": ("validation", "validation"),
    "speech_commands": ("validation", "test"),
    "imdb_reviews": ("test", "test"),
}
# The ten words of the raw speech task of the paper (its reference is Kidger et al. 2020).
SPEECH_WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
_SPEECH_COMMANDS_VERSION = "0.0.3"


class TfdsExamples(TransformedExamples):
    """A split of a set.

    Args:
      name: a set of `INPUTS`, with config and version if needed.
      split: its split.
      directory: of prepared sets; empty: the library's own.
      transform: from the feature (an image, samples or bytes) to a document.

    Raises:
      DataError: the set is not known or not prepared.
    """

    def __init__(
        self,
        name: str,
        split: str,
        *,
        directory: str,
        transform: Callable[[Any], np.ndarray],
    ):
        super().__init__(transform)
        base = name.partition("/")[0].partition(":")[0]
        if base not in INPUTS:
            raise DataError(
                f"examples.tfds_name is {name!r}; use one of {', '.join(INPUTS)}, or local files"
            )
        try:
            builder = _open_builder(name, directory or None)
            self._data: Any = builder.as_data_source(split)
        except (ValueError, KeyError, OSError, RuntimeError, AssertionError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise DataError(
                f"cannot open TFDS data set {name!r}, split {split!r}: {reason} Prepare it first: "
                f"tfds.builder({name!r}, file_format='array_record').download_and_prepare()"
            ) from error
        self._name, self._split, self._feature = name, split, INPUTS[base]
        names = tuple(builder.info.features["label"].names)
        self.classes, self._numbers = names, None
        if base == "speech_commands":
            self.classes = SPEECH_WORDS
            wanted = {names.index(word): n for n, word in enumerate(SPEECH_WORDS) if word in names}
            labels = [int(example["label"]) for example in self._data]
            self._numbers = [i for i, label in enumerate(labels) if label in wanted]
            self._wanted = wanted

    def __len__(self) -> int:
        return len(self._data if self._numbers is None else self._numbers)

    def name(self, index: int) -> str:
        return f"{self._name}/{self._split}#{index}"

    def array(self, index: int) -> tuple[np.ndarray, int]:
        try:
            record = self._data[index if self._numbers is None else self._numbers[index]]
        except ImportError as error:
            raise DataError(
                f"{self.name(index)}: images need Pillow or OpenCV, and neither is installed: pip "
                "install 'megalodon-flax[images]'"
            ) from error
        label = int(record["label"])
        if self._numbers is not None:
            label = self._wanted[label]
        return record[self._feature], label

    def fingerprint(self) -> str:
        return digest_of(self._name, self._split, len(self))


def _open_builder(name: str, directory: str | None) -> Any:
    """The reader of prepared files; the code that generates a set may need TensorFlow."""
    from tensorflow_datasets.core.read_only_builder import builder_from_files

    base, _, version = name.partition(":")
    if base != "speech_commands":
        return builder_from_files(name, data_dir=directory)
    return _speech_commands(version or _SPEECH_COMMANDS_VERSION, directory)


def _speech_commands(version: str, directory: str | None) -> Any:
    """The reader of speech_commands, whose samples are tensors of whole numbers.

    The library's own feature for sound needs TensorFlow.
    """
    import tensorflow_datasets as tfds

    class SpeechCommands(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)

        def _info(self) -> Any:
            audio = tfds.features.Tensor(shape=(None,), dtype=np.int64)
            features = {"audio": audio, "label": tfds.features.ClassLabel()}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager: Any) -> Any:
            raise DataError("this reader of speech_commands does not prepare it")

        _generate_examples = _split_generators

    return SpeechCommands(data_dir=directory, file_format="array_record")
