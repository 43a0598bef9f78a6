"""Mixtures: shares of tokens, epochs, exact resumption, counts; several held-out sets."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalodon_jax.config import DataConfig, HeldoutSet, MixtureSource, config_from_dict
from megalodon_jax.data import (
    Tokenizer,
    heldout_names,
    load_tokenizer,
    make_loader,
    open_source,
    pipeline,
    total_counts,
)
from megalodon_jax.errors import ConfigError, DataError

# First number and lengths of the documents of each source.
NUMBERS = {"small": (1, [5, 9, 3]), "large": (10_000, [40, 1, 12, 30, 8])}


def _write(path: Path, start: int, lengths: list[int]) -> str:
    starts = np.cumsum([start, *lengths])
    texts = [" ".join(map(str, range(a, b))) for a, b in itertools.pairwise(starts)]
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    monkeypatch.setattr(pipeline, "WINDOW_TOKENS", 5 * 8)
    weights = {"small": 1.0, "large": 3.0}
    sources = tuple(
        MixtureSource(
            name=name,
            files=(_write(tmp_path / f"{name}.jsonl", *NUMBERS[name]),),
            text_field="body",
            weight=weights[name],
        )
        for name in NUMBERS
    )
    return DataConfig(sources=sources, heldout_fraction=0.0, seq_len=8, batch_size=2)


def _source_of(targets: np.ndarray) -> np.ndarray:
    return np.where(targets >= 10_000, 1, 0)


def test_tokens_have_the_shares_of_the_weights(mixture: DataConfig, numbers: Tokenizer):
    loader = make_loader(mixture, numbers, "train", repeat=True)
    tokens, ends, unknown = np.zeros(2, int), 0, 0
    for batch in itertools.islice(loader, 300):
        for row in range(2):
            targets = batch.targets[row][batch.weights[row] > 0]
            sources = set(_source_of(targets[targets > 0]).tolist())
            # A row has documents of one source.
            assert len(sources) <= 1
            ends += int((targets == 0).sum())
            if sources:
                tokens[sources.pop()] += len(targets)
            else:
                # Only the end of a document, of either source.
                unknown += len(targets)
    counts = total_counts([loader.counts()])
    assert tokens[1] / tokens[0] == pytest.approx(3.0, rel=0.03)
    assert sum(entry.tokens for entry in counts) == tokens.sum() + unknown
    # A document starts for every one that ends, but for those at the windows' ends.
    assert abs(sum(entry.documents for entry in counts) - ends) < 10
    assert loader.source_names == ("small", "large")
    loader.close()


def test_every_epoch_of_a_source_is_complete(mixture: DataConfig, numbers: Tokenizer):
    sources = (dataclasses.replace(mixture.sources[0], epochs=2), mixture.sources[1])
    config = dataclasses.replace(mixture, sources=sources)
    loader = make_loader(config, numbers, "train", repeat=True)
    batches = list(itertools.islice(loader, 300))
    targets = np.concatenate([batch.targets[batch.weights > 0] for batch in batches])
    small = targets[(targets > 0) & (targets < 10_000)]
    # Twice every token, then only the other source.
    assert sorted(small.tolist()) == sorted([*range(1, 18)] * 2)
    last = np.concatenate([batch.targets[batch.weights > 0] for batch in batches[-50:]])
    assert ((last == 0) | (last >= 10_000)).all()


def test_training_ends_with_the_last_epoch_of_all_sources(mixture: DataConfig, numbers: Tokenizer):
    sources = tuple(dataclasses.replace(source, epochs=1) for source in mixture.sources)
    loader = make_loader(
        dataclasses.replace(mixture, sources=sources), numbers, "train", repeat=True
    )
    batches: list = []
    with pytest.raises(DataError, match="read as often as their `epochs` say"):
        batches.extend(loader)
    loader.close()
    found = [t for batch in batches for t in batch.targets[batch.weights > 0].tolist()]
    assert sorted(t for t in found if t) == [*range(1, 18), *range(10_000, 10_091)]


def test_resumed_equals_uninterrupted(mixture: DataConfig, numbers: Tokenizer):
    loader = make_loader(mixture, numbers, "train", repeat=True)
    states, batches, counts = [], [], []
    for _ in range(40):
        states.append(json.dumps(loader.state_dict()))
        batches.append(next(loader))
        counts.append(loader.counts())
    resumed = make_loader(mixture, numbers, "train", repeat=True)
    for step in (0, 1, 7, 18, 36):
        resumed.load_state_dict(json.loads(states[step]))
        for i in range(step, step + 4):
            for a, b in zip(next(resumed), batches[i], strict=True):
                np.testing.assert_array_equal(a, b)
            assert resumed.counts() == counts[i]
    other = dataclasses.replace(mixture.sources[0], weight=2.0)
    changed = dataclasses.replace(mixture, sources=(other, mixture.sources[1]))
    with pytest.raises(DataError, match=r"weights was \[1\.0, 3\.0\] and is \[2\.0, 3\.0\]"):
        make_loader(changed, numbers, "train", repeat=True).load_state_dict(json.loads(states[3]))


def test_a_damaged_state_is_refused(mixture: DataConfig, numbers: Tokenizer):
    loader = make_loader(mixture, numbers, "train", repeat=True)
    state = loader.state_dict()
    for damaged, message in (
        ({**state, "extra": 1}, "the loader state has unknown keys: extra"),
        ({**state, "settings": {**state["settings"], "sEed": 1}}, "settings .* unknown keys: sEed"),
        ({**state, "shards": {"0": {"readers": [], "next": 0}}}, "data shard 0 .* lacks counts"),
    ):
        with pytest.raises(DataError, match=message):
            loader.load_state_dict(damaged)


def test_sources_have_held_out_documents_of_their_own(tmp_path: Path):
    for name in ("a", "b"):
        _write(tmp_path / f"{name}.jsonl", 1, [3] * 60)
    sources = tuple(
        MixtureSource(name=n, files=(str(tmp_path / f"{n}.jsonl"),), text_field="body")
        for n in ("a", "b")
    )
    config = DataConfig(sources=sources, heldout_fraction=0.3)
    assert heldout_names(config) == ("a", "b")
    for name in ("a", "b"):
        parts = [open_source(config, split, name=name) for split in ("train", "heldout")]
        assert not {d.name for d in parts[0]} & {d.name for d in parts[1]}
        assert len(parts[0]) + len(parts[1]) == 60
    with pytest.raises(DataError, match="there is no text source 'c'; use one of 'a', 'b'"):
        open_source(config, "heldout", name="c")


def test_named_held_out_sets_are_left_out_of_training(tmp_path: Path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(f"text {name}")
    sets = tuple(HeldoutSet(name=n, files=(str(tmp_path / f"{n}.txt"),)) for n in ("b", "c"))
    config = DataConfig(files=(str(tmp_path / "*.txt"),), heldout_sets=sets, seq_len=8)
    assert heldout_names(config) == ("b", "c")
    assert [document.text for document in open_source(config, "train")] == ["text a"]
    tokenizer = load_tokenizer("bytes")
    for name in ("b", "c"):
        loader = make_loader(config, tokenizer, "heldout", repeat=False, name=name)
        targets = np.concatenate([batch.targets[batch.weights > 0] for batch in loader])
        assert tokenizer.decode(targets) == f"text {name}"


def _parse(**data: Any) -> DataConfig:
    return config_from_dict({"data": data}).data


def test_tables_of_sources_and_sets():
    config = _parse(
        sources=[{"name": "web", "files": ["a.txt"], "weight": 2}],
        heldout_sets=[{"name": "books", "files": ["b.txt"]}],
    )
    assert config.sources == (MixtureSource(name="web", files=("a.txt",), weight=2.0),)
    assert config.heldout_sets[0].kind == "files"
    saved = json.loads(json.dumps(dataclasses.asdict(config)))
    assert _parse(**saved) == config


def test_files_imply_the_source():
    assert _parse(files=["a.txt"]).kind == "files"
    assert _parse(tfds_name="lm1b").kind == "tfds"
    assert _parse().kind == "python_stdlib"
    with pytest.raises(ConfigError, match=r"is 'python_stdlib' but data\.files is set"):
        _parse(source="python_stdlib", files=["a.txt"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"files": "a.txt"}, r"data\.files is 'a\.txt'; use a list of texts"),
        ({"heldout_files": ""}, r"data\.heldout_files is ''; use a list of texts"),
        ({"sources": {"name": "a"}}, r"use a list of tables, \[\[data\.sources\]\]"),
        ({"sources": [{"name": "a", "wieght": 1}]}, "unknown key 'wieght'.*mean 'weight'"),
        ({"sources": [{"files": ["a"]}]}, "name"),
        (
            {"sources": [{"name": "a"}, {"name": "a"}]},
            r"two tables of \[\[data\.sources\]\] have the same name",
        ),
        ({"sources": [{"name": "a/b"}]}, "the name 'a/b' .* other characters"),
        ({"sources": [{"name": "a", "weight": 0.0}]}, "weight is 0.0; must be positive"),
        ({"sources": [{"name": "a", "weight": float("nan")}]}, "weight is nan; must be finite"),
        ({"sources": [{"name": "a", "epochs": -1}]}, "epochs is -1; must not be negative"),
        ({"sources": [{"name": "a"}], "files": ["x"]}, "both a source of its own and"),
        ({"sources": [{"name": "a", "source": "files"}]}, "files is empty; name at least one path"),
        ({"heldout_sets": [{"name": "a"}], "heldout_files": ["x"]}, "are both set"),
        ({"hf_path": "json", "hf_streaming": True}, "hf_streaming needs"),
        ({"on_bad_document": "drop"}, "on_bad_document is 'drop'; use one of 'stop', 'skip'"),
    ],
)
def test_wrong_tables_are_refused(data: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        _parse(**data)
