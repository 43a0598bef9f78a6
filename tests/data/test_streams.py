"""Rows that continue each other (`data.carry_state`): order, numbering, resumption, shards."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from megalodon_jax.config import DataConfig, MixtureSource
from megalodon_jax.data import Loader, Tokenizer, make_loader, merge_states
from megalodon_jax.errors import ConfigError, DataError
from megalodon_jax.typing import Batch

# Many rows, exactly two rows with its eos, one token, no token, exactly a row.
LENGTHS = (45, 15, 1, 0, 7, 30, 3, 22, 9)
ConfigMaker = Callable[..., DataConfig]


def take(loader: Loader, count: int) -> list[Batch]:
    return list(itertools.islice(loader, count))


def streams_of(batches: Sequence[Batch]) -> list[list[list[int]]]:
    """The documents (targets) of every row over all batches, cut by the definition of `Batch`."""
    streams: list[list[list[int]]] = [[] for _ in batches[0].tokens]
    for batch in batches:
        for stream, row in zip(streams, zip(*batch, strict=True), strict=True):
            tokens, targets, segment_ids, weights = row
            previous = 1  # a row's first document continues if its number is 1
            for token, target, segment, weight in zip(tokens, targets, segment_ids, weights):
                assert weight == (segment > 0)
                if segment == 0:
                    continue
                if segment != previous:
                    assert segment == previous + 1
                    assert token == 0  # bos
                    stream.append([])
                elif stream[-1]:
                    assert token == stream[-1][-1]
                stream[-1].append(int(target))
                previous = segment
    return streams


@pytest.mark.parametrize("packing", ["pack", "pad"])
def test_every_row_is_a_stream_of_whole_documents_in_order(
    numbers: Tokenizer, number_config: ConfigMaker, packing: str
):
    config = number_config(LENGTHS, carry_state=True, batch_size=3, packing=packing)
    loader = make_loader(config, numbers, "train", repeat=True)
    batches = take(loader, 40)
    loader.close()
    if packing == "pack":
        assert all(batch.weights.all() for batch in batches)
    starts = np.cumsum([1, *LENGTHS])[:-1]
    documents = {
        (*range(start, start + length), 0)
        for start, length in zip(starts, LENGTHS, strict=True)
        if length
    }
    streams = streams_of(batches)
    for stream in streams:
        assert len(stream) > 3
        assert {tuple(document) for document in stream[:-1]} <= documents
    continued = [batch.segment_ids[:, 0] == 1 for batch in batches]
    assert 0 < np.mean(continued) < 1
    assert not continued[0].any()


def test_documents_are_taken_once_an_epoch_by_the_row_that_is_free(
    numbers: Tokenizer, number_config: ConfigMaker
):
    config = number_config(LENGTHS, carry_state=True, batch_size=3)
    loader = make_loader(config, numbers, "train", repeat=True)
    batches = take(loader, 60)
    loader.close()
    # Rows are filled one after another; the input 0 is bos.
    first = [int(t) for batch in batches for t in batch.targets[batch.tokens == 0]]
    documents = [int(s) for s, n in zip(np.cumsum([1, *LENGTHS])[:-1], LENGTHS, strict=True) if n]
    epochs = [first[i : i + len(documents)] for i in range(0, len(first), len(documents))][:-1]
    assert len(epochs) > 5
    assert all(sorted(epoch) == documents for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 3


@pytest.mark.parametrize("num_shards", [1, 2])
def test_a_restored_loader_continues_inside_documents(
    numbers: Tokenizer, number_config: ConfigMaker, num_shards: int
):
    config = number_config(LENGTHS, carry_state=True, num_shards=num_shards)
    loader = make_loader(config, numbers, "train", repeat=True)
    for _ in range(5):
        take(loader, 3)
        state = json.loads(json.dumps(loader.state_dict()))
        expected = take(loader, 6)
        restored = make_loader(config, numbers, "train", repeat=True)
        restored.load_state_dict(state)
        for first, second in zip(take(restored, 6), expected, strict=True):
            for a, b in zip(first, second, strict=True):
                np.testing.assert_array_equal(a, b)
        restored.close()
    loader.close()


def test_rows_do_not_depend_on_the_processes_that_load_them(
    numbers: Tokenizer, number_config: ConfigMaker
):
    config = number_config(LENGTHS, carry_state=True, num_shards=2)
    whole = make_loader(config, numbers, "train", repeat=True)
    parts = [
        make_loader(config, numbers, "train", rows=rows, repeat=True) for rows in ([0, 1], [2, 3])
    ]
    for _ in range(6):
        expected, *found = (next(loader) for loader in (whole, *parts))
        for a, b in zip(expected, map(np.concatenate, zip(*found, strict=True)), strict=True):
            np.testing.assert_array_equal(a, b)
    merged = merge_states([part.state_dict() for part in parts])
    assert merged["shards"] == whole.state_dict()["shards"]
    for loader in (whole, *parts):
        loader.close()


def test_heldout_rows_do_not_follow_each_other(numbers: Tokenizer, number_config: ConfigMaker):
    config = number_config(LENGTHS)
    carried = dataclasses.replace(config, carry_state=True)
    pairs = zip(
        make_loader(config, numbers, "train", repeat=False),
        make_loader(carried, numbers, "train", repeat=False),
        strict=True,
    )
    for first, second in pairs:
        np.testing.assert_array_equal(first.segment_ids, second.segment_ids)
        np.testing.assert_array_equal(first.tokens, second.tokens)


def test_what_cannot_be_combined_is_refused_by_name(numbers: Tokenizer, number_config: ConfigMaker):
    with pytest.raises(ConfigError, match=r"num_workers = 2, .*use 0 or 1"):
        number_config(LENGTHS, carry_state=True, num_workers=2)
    sources = tuple(MixtureSource(name=name, files=("a.txt",)) for name in ("a", "b"))
    with pytest.raises(ConfigError, match=r"carry_state is set with \[\[data.sources\]\]"):
        number_config(LENGTHS, carry_state=True, source="auto", files=(), sources=sources)
    few = number_config(LENGTHS, carry_state=True, batch_size=10)
    with pytest.raises(DataError, match=r"9 documents are fewer than the 10 rows"):
        make_loader(few, numbers, "train", repeat=True)
    plain = make_loader(number_config(LENGTHS), numbers, "train", repeat=True)
    carried = make_loader(number_config(LENGTHS, carry_state=True), numbers, "train", repeat=True)
    with pytest.raises(DataError, match="packing was 'pack' and is 'pack, carry_state'"):
        carried.load_state_dict(plain.state_dict())
    plain.close()
    carried.close()
