"""Prepared TFDS data sets, read without TensorFlow."""

import sys
from pathlib import Path

import numpy as np
import pytest

from megalodon_jax.config import DataConfig
from megalodon_jax.data import load_tokenizer, make_loader, open_source
from megalodon_jax.errors import DataError

tfds = pytest.importorskip("tensorflow_datasets")
TEXTS = {"train": ["erste Zeile é", "two", "drei 日本"], "validation": ["held out"]}


class TinyPages(tfds.core.GeneratorBasedBuilder):
    """Four short texts."""

    # Nothing is downloaded, so there is no file of checksums.
    url_infos = None
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"body": tfds.features.Text(), "year": np.int32}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in TEXTS}

    def _generate_examples(self, split):
        for index, text in enumerate(TEXTS[split]):
            yield index, {"body": text, "year": 1900 + index}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = str(tmp_path_factory.mktemp("tfds"))
    tfds.disable_progress_bar()
    TinyPages(data_dir=directory, file_format="array_record").download_and_prepare()
    return directory


def _config(directory: str, **settings: object) -> DataConfig:
    defaults: dict = {"source": "tfds", "tfds_name": "tiny_pages", "text_field": "body"}
    return DataConfig(**{**defaults, "tfds_dir": directory, "seq_len": 8, **settings})


def test_texts_of_both_splits(prepared: str):
    train = open_source(_config(prepared), "train")
    assert sorted(document.text for document in train) == sorted(TEXTS["train"])
    assert [document.name for document in train] == [f"tiny_pages/train#{i}" for i in range(3)]
    heldout = open_source(_config(prepared, tfds_name="tiny_pages:1.0.0"), "heldout")
    assert [document.text for document in heldout] == TEXTS["validation"]
    sliced = open_source(_config(prepared, tfds_split="train[:2]"), "train")
    assert [document.text for document in sliced] == [document.text for document in train][:2]


def test_batches(prepared: str):
    loader = make_loader(_config(prepared), load_tokenizer("bytes"), "train", repeat=False)
    total = sum(counted.num_bytes for counted in loader.with_bytes())
    assert total == sum(len(text.encode()) for text in TEXTS["train"])
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"tfds_name": "no_such_set"},
            r"'no_such_set'.*not found.*Prepare it first: tfds\.builder",
        ),
        ({"tfds_split": "bogus"}, "split 'bogus'.*Unknown split 'bogus'"),
        ({"tfds_name": "tiny_pages:9.9.9"}, "tiny_pages:9.9.9.*Prepare it first"),
    ],
)
def test_an_unprepared_data_set_is_named(prepared: str, settings: dict, message: str):
    with pytest.raises(DataError, match=message):
        open_source(_config(prepared, **settings), "train")


def test_an_empty_directory_is_named(tmp_path: Path):
    with pytest.raises(
        DataError, match=r"cannot open TFDS data set 'tiny_pages'.*Prepare it first"
    ):
        open_source(_config(str(tmp_path)), "train")


def test_a_wrong_field_is_named(prepared: str):
    with pytest.raises(
        DataError, match="tiny_pages/train#0: no field 'text'; there are: body, year"
    ):
        open_source(_config(prepared, text_field="text"), "train")[0]
    with pytest.raises(DataError, match=r"field 'year' is .*; the text must be a string"):
        open_source(_config(prepared, text_field="year"), "train")[0]
