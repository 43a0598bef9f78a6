"""Labelled sets of tensorflow-datasets, written without TensorFlow, read by the shipped runs."""

import dataclasses
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from megalodon_jax.config import TrainConfig, load_config
from megalodon_jax.data import ByteTokenizer
from megalodon_jax.data.example_sets.texts import EOS
from megalodon_jax.data.example_sets.tfds import SPEECH_WORDS, TfdsExamples
from megalodon_jax.errors import DataError
from megalodon_jax.presets import configs_dir
from megalodon_jax.tasks import find_task
from megalodon_jax.tasks.classification import ExampleSets

pytest.importorskip("tensorflow_datasets")
import tensorflow_datasets as tfds

Image = pytest.importorskip("PIL.Image")
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 32, 32, 3)).astype(np.uint8)
WAVES = RNG.integers(-(2**15), 2**15, (5, 90)).astype(np.int64)
WORDS = ("down", "go", "left", "_silence_", "yes")
REVIEWS = ("bad", "good", "so so")


def encoded(pixels: np.ndarray, form: str) -> io.BytesIO:
    """The file of an image: TFDS encodes arrays with TensorFlow, and files as they are."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    file.seek(0)
    return file


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    url_infos = None
    VERSION = tfds.core.Version("3.0.2")
    features: dict = {}  # noqa: RUF012
    splits = ("train", "test")

    def _info(self):
        features = tfds.features.FeaturesDict(self.features)
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples() for split in self.splits}


class Cifar10(_Builder, skip_registration=True):
    """Features as in the real set."""

    features = {  # noqa: RUF012
        "id": tfds.features.Text(),
        "image": tfds.features.Image(shape=(32, 32, 3)),
        "label": tfds.features.ClassLabel(names=["airplane", "automobile", "bird"]),
    }

    def _generate_examples(self):
        for n, pixels in enumerate(PIXELS):
            yield n, {"id": f"train_{n}", "image": encoded(pixels, "PNG"), "label": n % 3}


class Imagenet2012(_Builder, skip_registration=True):
    """JPEG files of different sizes."""

    splits = ("train", "validation")
    features = {  # noqa: RUF012
        "file_name": tfds.features.Text(),
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(num_classes=1000),
    }

    def _generate_examples(self):
        for n in range(3):
            image = np.full((250 + 10 * n, 300, 3), (40 * n, 100, 200), np.uint8)
            yield n, {"file_name": f"{n}.JPEG", "image": encoded(image, "JPEG"), "label": 990 + n}


class SpeechCommands(_Builder, skip_registration=True):
    """The ten words, silence, and others."""

    VERSION = tfds.core.Version("0.0.3")
    splits = ("train", "validation", "test")
    features = {  # noqa: RUF012
        # The real set has the feature Audio, which stores the same numbers and needs TensorFlow.
        "audio": tfds.features.Tensor(shape=(None,), dtype=np.int64),
        "label": tfds.features.ClassLabel(names=[*sorted(SPEECH_WORDS), "_silence_", "_unknown_"]),
    }

    def _generate_examples(self):
        for n, (wave, word) in enumerate(zip(WAVES, WORDS, strict=True)):
            yield n, {"audio": wave, "label": word}


class ImdbReviews(_Builder, skip_registration=True):
    """A set with a configuration, in a folder of its name."""

    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="plain_text")]  # noqa: RUF012
    features = {  # noqa: RUF012
        "text": tfds.features.Text(),
        "label": tfds.features.ClassLabel(names=["neg", "pos"]),
    }

    def _generate_examples(self):
        for n, text in enumerate(REVIEWS):
            yield n, {"text": text, "label": n % 2}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = str(tmp_path_factory.mktemp("tfds"))
    tfds.disable_progress_bar()
    for builder in (Cifar10, Imagenet2012, SpeechCommands, ImdbReviews):
        builder(data_dir=directory, file_format="array_record").download_and_prepare()
    # As the real set describes itself.
    described = Path(directory) / "speech_commands/0.0.3/features.json"
    features = json.loads(described.read_text())
    audio = features["featuresDict"]["features"]["audio"]
    audio["pythonClassName"] = "tensorflow_datasets.core.features.audio_feature.Audio"
    tensor = audio.pop("tensor")
    audio["audio"] = {"dtype": "int64", "shape": tensor["shape"], "fileFormat": "wav"}
    described.write_text(json.dumps(features))
    return directory


def shipped(name: str, directory: str) -> tuple[TrainConfig, ExampleSets]:
    config = load_config(configs_dir() / f"tasks/{name}.toml")
    config = dataclasses.replace(
        config, examples=dataclasses.replace(config.examples, tfds_dir=directory)
    )
    return config, find_task(config.task).example_sets(config)


def test_cifar10_as_gray_pixels(prepared: str):
    config, sets = shipped("lra_image", prepared)
    assert sets.train.classes == ("airplane", "automobile", "bird")
    expected = (PIXELS / 255).mean(-1).reshape(6, -1, 1)
    order = []
    for index in range(len(sets.train)):
        (document,), label = sets.train.example(index)
        gray = document * config.examples.std + config.examples.mean
        n = int(np.abs(expected - gray).sum(axis=(1, 2)).argmin())
        np.testing.assert_allclose(gray, expected[n], atol=1e-5)
        assert label == n % 3
        order.append(n)
    assert sorted(order) == list(range(6))
    data = dataclasses.replace(config.data, batch_size=2)
    training, heldout = find_task("pixels").open_loaders(
        dataclasses.replace(config, data=data), ByteTokenizer(), rows=range(2), num_shards=1
    )
    assert next(training).tokens.shape == (2, 1024, 1)
    assert sum(int(batch.weights.sum()) for batch, _ in heldout[""].with_bytes()) == 6
    training.close()


def test_imagenet_as_patches(prepared: str):
    config, sets = shipped("imagenet", prepared)
    found = {}
    for index in range(len(sets.heldout[""])):
        (document,), label = sets.heldout[""].example(index)
        assert document.shape == (196, 768)
        found[label] = np.round((document.mean(0)[:3] * 0.226 + 0.449) * 255)
    assert found.keys() == {990, 991, 992}
    for label, color in found.items():
        # JPEG moves a color by a unit or two.
        np.testing.assert_allclose(color, (40 * (label - 990), 100, 200), atol=3)
    assert config.model.num_outputs == len(sets.train.classes) == 1000


def test_ten_words_of_speech_commands(prepared: str):
    config, sets = shipped("speech_commands", prepared)
    settings = config.examples
    assert sets.train.classes == SPEECH_WORDS
    examples = [sets.train.example(index) for index in range(len(sets.train))]
    spoken = [word for word in WORDS if word != "_silence_"]
    assert sorted(SPEECH_WORDS[label] for _, label in examples) == sorted(spoken)
    for (document,), label in examples:
        samples = np.round((document[:90, 0] * settings.std + settings.mean) * 2**15)
        np.testing.assert_array_equal(samples, WAVES[WORDS.index(SPEECH_WORDS[label])])


def test_bytes_of_imdb_reviews(prepared: str):
    _, sets = shipped("lra_text", prepared)
    assert sets.train.classes == ("neg", "pos")
    examples = [sets.train.example(index) for index in range(len(sets.train))]
    texts = {bytes(document[document < EOS].astype(np.uint8)): n for (document,), n in examples}
    assert {text.decode(): n for text, n in texts.items()} == dict(zip(REVIEWS, (0, 1, 0)))


def test_sets_that_are_not_prepared(tmp_path):
    assert "tensorflow" not in sys.modules
    with pytest.raises(DataError, match=r"cannot open TFDS data set 'cifar10'.*Prepare it first"):
        TfdsExamples("cifar10", "train", directory=str(tmp_path), transform=np.asarray)
