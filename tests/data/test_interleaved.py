"""Documents that are read side by side: rows of many documents, and positions of older versions."""

import itertools
import json
from collections.abc import Callable

import numpy as np

from megalodon_jax.config import DataConfig
from megalodon_jax.data import Tokenizer, interleaved, make_loader, pipeline
from megalodon_jax.typing import Batch

ConfigMaker = Callable[..., DataConfig]


def _documents_of(batch: Batch, lengths: list[int]) -> set[int]:
    return {int(np.searchsorted(np.cumsum(lengths), row[0])) for row in batch.targets}


def test_consecutive_rows_come_from_many_documents(
    numbers: Tokenizer, number_config: ConfigMaker, monkeypatch
):
    """Also where a document is longer than a window."""
    monkeypatch.setattr(pipeline, "WINDOW_TOKENS", 16 * 8)
    lengths = [400] * 20
    config = number_config(lengths, batch_size=16)
    batches = itertools.islice(make_loader(config, numbers, "train", repeat=True), 30)
    assert min(len(_documents_of(batch, lengths)) for batch in batches) >= 12
    # A single pass reads one document after another.
    batches = itertools.islice(make_loader(config, numbers, "train", repeat=False), 10)
    assert max(len(_documents_of(batch, lengths)) for batch in batches) <= 3


def test_a_position_of_an_older_version_keeps_its_order(
    numbers: Tokenizer, number_config: ConfigMaker, monkeypatch
):
    monkeypatch.setattr(pipeline, "WINDOW_TOKENS", 3 * 8)
    config = number_config((30, 3, 7, 1, 0, 16, 5), batch_size=2)
    with monkeypatch.context() as older:
        older.setattr(pipeline, "InterleavedReader", interleaved.RowReader)
        loader = make_loader(config, numbers, "train", repeat=True)
        list(itertools.islice(loader, 5))
        state = json.dumps(loader.state_dict())
        expected = list(itertools.islice(loader, 12))
        loader.close()
    assert "turn" not in state
    resumed = make_loader(config, numbers, "train", repeat=True)
    resumed.load_state_dict(json.loads(state))
    for batch, other in zip(itertools.islice(resumed, 12), expected, strict=True):
        for a, b in zip(batch, other, strict=True):
            np.testing.assert_array_equal(a, b)
    resumed.close()
