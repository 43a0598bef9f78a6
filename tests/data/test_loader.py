"""Loaders: every target once per epoch, exact resumption, data shards, exact byte counts."""

import dataclasses
import gc
import itertools
import json
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from megalodon_jax.config import DataConfig
from megalodon_jax.data import Loader, Tokenizer, load_tokenizer, make_loader, merge_states
from megalodon_jax.errors import DataError
from megalodon_jax.typing import Batch

# Longer than a row, shorter, exactly a row, one token, no token.
LENGTHS = (30, 3, 7, 1, 0, 16, 5)
NUM_TOKENS = sum(LENGTHS)
NUM_TARGETS = NUM_TOKENS + sum(length > 0 for length in LENGTHS)
ConfigMaker = Callable[..., DataConfig]


def _targets(batches: Iterable[Batch]) -> list[int]:
    return [int(t) for batch in batches for t in batch.targets[batch.weights > 0]]


def _expected_targets(epochs: int = 1) -> Counter[int]:
    ends = {0: epochs * (NUM_TARGETS - NUM_TOKENS)}
    return Counter(dict.fromkeys(range(1, NUM_TOKENS + 1), epochs) | ends)


def _assert_same(left: Iterable[Batch], right: Iterable[Batch]) -> None:
    for first, second in zip(left, right, strict=True):
        for a, b in zip(first, second, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def _take(loader: Loader, count: int) -> list[Batch]:
    return list(itertools.islice(loader, count))


def _take_epochs(loader: Loader, epochs: int) -> list[Batch]:
    batches: list[Batch] = []
    while sum(batch.weights.sum() for batch in batches) < epochs * NUM_TARGETS:
        batches.append(next(loader))
    return batches


def _following(number_config_lengths: Iterable[int]) -> dict[int, int]:
    stops = set(np.cumsum(list(number_config_lengths)).tolist())
    return {t: 0 if t in stops else t + 1 for t in range(1, NUM_TOKENS + 1)}


@pytest.mark.parametrize("packing", ["pack", "pad"])
@pytest.mark.parametrize("repeat", [False, True])
def test_rows_satisfy_the_definition_of_a_batch(
    numbers: Tokenizer, number_config: ConfigMaker, packing: str, repeat: bool
):
    config = number_config(LENGTHS, packing=packing)
    loader = make_loader(config, numbers, "train", repeat=repeat)
    following = _following(LENGTHS)
    firsts = set(np.cumsum([1, *LENGTHS]).tolist())
    for batch in itertools.islice(loader, 20):
        assert {array.shape for array in batch} == {(4, 8)}
        assert [str(array.dtype) for array in batch] == ["int32"] * 3 + ["float32"]
        np.testing.assert_array_equal(batch.weights, batch.segment_ids > 0)
        for tokens, targets, segment_ids, _ in zip(*batch, strict=True):
            used = int((segment_ids > 0).sum())
            assert not tokens[used:].any()
            assert not targets[used:].any()
            # Segments are numbered 1, 2, ... from the left; padding is at the right.
            assert segment_ids[:1].tolist() == [min(used, 1)]
            assert set(np.diff(segment_ids[:used]).tolist()) <= {0, 1}
            if packing == "pad":
                assert segment_ids.max() <= 1
            for i in range(used):
                inside = i + 1 < used and segment_ids[i + 1] == segment_ids[i]
                if inside:
                    assert targets[i] == tokens[i + 1]
                # The next token of the document, also where the document is cut.
                if tokens[i]:
                    assert targets[i] == following[int(tokens[i])]
                else:
                    assert int(targets[i]) in firsts
                    assert i == 0 or segment_ids[i] != segment_ids[i - 1]
    loader.close()


@pytest.mark.parametrize("packing", ["pack", "pad"])
def test_one_pass_has_every_target_once_in_a_fixed_mixed_order(
    numbers: Tokenizer, number_config: ConfigMaker, packing: str
):
    config = number_config(LENGTHS, packing=packing)
    loader = make_loader(config, numbers, "train", repeat=False)
    batches = list(loader)
    starts = np.cumsum([1, *LENGTHS])[:-1]
    documents = [[*range(s, s + n), 0] for s, n in zip(starts, LENGTHS, strict=True) if n]
    targets = _targets(batches)
    ends = [i + 1 for i, target in enumerate(targets) if target == 0]
    found = [targets[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    assert sorted(found) == documents
    assert found != documents
    other_seed = dataclasses.replace(config, shuffle_seed=config.shuffle_seed + 1)
    assert _targets(list(make_loader(other_seed, numbers, "train", repeat=False))) == targets
    num_rows = sum(int((batch.segment_ids[:, 0] > 0).sum()) for batch in batches)
    if packing == "pack":
        assert num_rows == -(-NUM_TARGETS // 8)
    else:
        assert num_rows == sum(-(-len(document) // 8) for document in documents)
    assert len(batches) == -(-num_rows // 4)
    assert next(loader, None) is None


@pytest.mark.parametrize("packing", ["pack", "pad"])
def test_every_epoch_has_every_target_once_in_a_new_order(
    numbers: Tokenizer, number_config: ConfigMaker, packing: str
):
    # One row per batch: an epoch is a whole number of batches.
    config = number_config(LENGTHS, packing=packing, batch_size=1)
    loader = make_loader(config, numbers, "train", repeat=True)
    epochs = [_targets(_take_epochs(loader, 1)) for _ in range(6)]
    for epoch in epochs:
        assert Counter(epoch) == _expected_targets()
    assert len({tuple(epoch) for epoch in epochs}) > 3
    loader.close()


def test_the_order_follows_the_seed(numbers: Tokenizer, number_config: ConfigMaker):
    def order(seed: int) -> list[int]:
        config = number_config(LENGTHS, shuffle_seed=seed)
        return _targets(_take(make_loader(config, numbers, "train", repeat=True), 8))

    assert order(3) == order(3)
    assert order(3) != order(4)


def test_rows_of_one_long_document_are_shuffled(numbers: Tokenizer, number_config: ConfigMaker):
    loader = make_loader(number_config([800]), numbers, "train", repeat=True)
    first = _take(loader, 1)[0].tokens[:, 0]
    assert sorted(first) != list(first) or first.max() - first.min() > 8 * 4


@pytest.mark.parametrize("packing", ["pack", "pad"])
@pytest.mark.parametrize("repeat", [False, True])
def test_resumed_equals_uninterrupted_at_every_step(
    numbers: Tokenizer, number_config: ConfigMaker, packing: str, repeat: bool, monkeypatch
):
    from megalodon_jax.data import pipeline

    # Windows of 3 rows: several per epoch, the last one shorter.
    monkeypatch.setattr(pipeline, "WINDOW_TOKENS", 3 * 8)
    config = number_config(LENGTHS, packing=packing, batch_size=2)
    loader = make_loader(config, numbers, "train", repeat=repeat)
    states, batches = [], []
    for _ in range(18 if repeat else 30):
        states.append(json.dumps(loader.state_dict()))
        if (batch := next(loader, None)) is None:
            break
        batches.append(batch)
    if repeat:
        assert sum(batch.weights.sum() for batch in batches) > 2 * NUM_TARGETS
    assert len(set(states)) == len(states)
    resumed = make_loader(config, numbers, "train", repeat=repeat)
    for step in [*range(len(states) - 1, -1, -1), 0, 5]:
        resumed.load_state_dict(json.loads(states[step]))
        assert json.dumps(resumed.state_dict()) == states[step]
        _assert_same(_take(resumed, 4)[: len(batches) - step], batches[step : step + 4])
    resumed.close()
    loader.close()


def test_saving_the_state_changes_no_batch(numbers: Tokenizer, number_config: ConfigMaker):
    unsaved = make_loader(number_config(LENGTHS), numbers, "train", repeat=True)
    saved = make_loader(number_config(LENGTHS), numbers, "train", repeat=True)
    for _ in range(10):
        saved.state_dict()
        _assert_same([next(saved)], [next(unsaved)])


def test_a_state_of_other_data_is_rejected(numbers: Tokenizer, number_config: ConfigMaker):
    state = make_loader(number_config(LENGTHS), numbers, "train", repeat=True).state_dict()
    other = make_loader(number_config(LENGTHS, seq_len=16), numbers, "train", repeat=True)
    with pytest.raises(DataError, match=r"data: seq_len was 8 and is 16; restore"):
        other.load_state_dict(state)
    other = make_loader(number_config([*LENGTHS, 2]), numbers, "train", repeat=True)
    with pytest.raises(DataError, match=r"documents was .* num_documents was 7 and is 8; restore"):
        other.load_state_dict(state)
    with pytest.raises(DataError, match="tokenizer was 'numbers' and is 'bytes'"):
        make_loader(
            number_config(LENGTHS), load_tokenizer("bytes"), "train", repeat=True
        ).load_state_dict(state)
    with pytest.raises(DataError, match="the loader state has version None, this version reads 3"):
        other.load_state_dict({})


def _open_rows(config: DataConfig, tokenizer: Tokenizer, num_loaders: int) -> list[Loader]:
    count = config.batch_size // num_loaders
    return [
        make_loader(config, tokenizer, "train", rows=range(first, first + count), repeat=True)
        for first in range(0, config.batch_size, count)
    ]


def _take_joined(loaders: list[Loader], count: int) -> list[Batch]:
    taken = zip(*(_take(loader, count) for loader in loaders), strict=True)
    return [Batch(*map(np.concatenate, zip(*batches, strict=True))) for batches in taken]


def test_training_shards_partition_the_documents(numbers: Tokenizer, number_config: ConfigMaker):
    # An epoch of a shard: three documents of 10 targets in 4 rows of 8.
    loaders = _open_rows(number_config([9] * 6, batch_size=2, num_shards=2), numbers, 2)
    partitions = set()
    for _ in range(5):
        epoch = [_take(loader, 4) for loader in loaders]
        assert {batch.tokens.shape for shard in epoch for batch in shard} == {(1, 8)}
        targets = [[t for t in _targets(shard) if t] for shard in epoch]
        assert sorted(targets[0] + targets[1]) == list(range(1, 55))
        partitions.add(tuple(sorted(targets[0])))
    assert len(partitions) > 1


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_batches_do_not_depend_on_the_number_of_loaders(
    numbers: Tokenizer, number_config: ConfigMaker, num_shards: int
):
    config = number_config(LENGTHS, num_shards=num_shards)
    whole = _take(make_loader(config, numbers, "train", repeat=True), 12)
    for num_loaders in (2, 4):
        _assert_same(_take_joined(_open_rows(config, numbers, num_loaders), 12), whole)
    # Rows that cross shard boundaries, and non-contiguous rows.
    for rows in ((1, 2), (0, 3), (1,)):
        loader = make_loader(config, numbers, "train", rows=rows, repeat=True)
        _assert_same(_take(loader, 12), [Batch(*(a[list(rows)] for a in batch)) for batch in whole])


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 4)])
def test_a_state_restores_with_another_number_of_loaders(
    numbers: Tokenizer, number_config: ConfigMaker, before: int, after: int
):
    config = number_config(LENGTHS, num_shards=2)
    first = _open_rows(config, numbers, before)
    _take_joined(first, 5)
    state = json.loads(json.dumps(merge_states([loader.state_dict() for loader in first])))
    # The number of shards comes from the state unless the configuration sets it.
    second = _open_rows(dataclasses.replace(config, num_shards=0), numbers, after)
    for loader in second:
        loader.load_state_dict(state)
    _assert_same(_take_joined(second, 8), _take_joined(first, 8))
    assert merge_states([loader.state_dict() for loader in second])["settings"]["num_shards"] == 2
    other = make_loader(dataclasses.replace(config, num_shards=4), numbers, "train", repeat=True)
    with pytest.raises(DataError, match="num_shards was 2 and is 4"):
        other.load_state_dict(state)


def test_states_must_be_complete_and_of_one_run(numbers: Tokenizer, number_config: ConfigMaker):
    config = number_config(LENGTHS, num_shards=2)
    half = _open_rows(config, numbers, 2)[0].state_dict()
    with pytest.raises(DataError, match="1 of 2 data shards have a state"):
        merge_states([half])
    with pytest.raises(DataError, match="lacks data shard 1 of 2"):
        make_loader(config, numbers, "train", repeat=True).load_state_dict(half)
    other = dataclasses.replace(config, shuffle_seed=4)
    with pytest.raises(DataError, match="load different data"):
        merge_states([half, _open_rows(other, numbers, 2)[1].state_dict()])


def test_processes_of_a_single_pass_pack_the_same_batches(
    numbers: Tokenizer, number_config: ConfigMaker
):
    config = number_config(LENGTHS)
    whole = list(make_loader(config, numbers, "train", repeat=False).with_bytes())
    halves = [
        list(
            make_loader(
                config, numbers, "train", rows=(2 * i, 2 * i + 1), repeat=False
            ).with_bytes()
        )
        for i in range(2)
    ]
    joined = [
        Batch(*(np.concatenate(pair) for pair in zip(a.batch, b.batch, strict=True)))  # type: ignore[arg-type]
        for a, b in zip(*halves, strict=True)
    ]
    _assert_same(joined, [counted.batch for counted in whole])
    for half in halves:
        assert [counted.num_bytes for counted in half] == [c.num_bytes for c in whole]


@pytest.mark.parametrize("packing", ["pack", "pad"])
def test_counted_bytes_are_those_of_the_text(tmp_path: Path, packing: Literal["pack", "pad"]):
    texts = ["plain text", "é日本語🙂" * 7, "x", "line\r\nline\n" * 5]
    path = tmp_path / "all.txt"
    path.write_bytes("\x00".join(texts).encode())
    config = DataConfig(
        source="files", files=(str(path),), document_separator="\x00", heldout_files=(str(path),),
        seq_len=16, batch_size=3, packing=packing,
    )  # fmt: skip
    loader = make_loader(config, load_tokenizer("bytes"), "heldout", repeat=False)
    for _ in range(2):
        num_bytes = 0
        for counted in loader.with_bytes():
            targets = counted.batch.targets[counted.batch.weights > 0]
            assert counted.num_bytes == (targets < 256).sum()
            num_bytes += counted.num_bytes
        assert num_bytes == sum(len(text.encode()) for text in texts)
        loader.rewind()


def test_counts_of_longer_tokens(numbers: Tokenizer, number_config: ConfigMaker):
    loader = make_loader(number_config(LENGTHS), numbers, "train", repeat=False)
    for counted in loader.with_bytes():
        targets = counted.batch.targets[counted.batch.weights > 0]
        assert counted.num_bytes == sum(len(str(t)) + 1 for t in targets if t)
    endless = make_loader(number_config(LENGTHS), numbers, "train", repeat=True)
    with pytest.raises(ValueError, match="repeat=True does not count bytes"):
        endless.with_bytes()


def test_training_and_heldout_text_add_up_to_the_text(tmp_path: Path):
    text = "".join(chr(32 + i % 90) for i in range(999))
    (tmp_path / "one.txt").write_text(text)
    config = DataConfig(source="files", files=(str(tmp_path / "one.txt"),), seq_len=32)
    tokenizer = load_tokenizer("bytes")
    texts = [
        "".join(tokenizer.decode(_targets(make_loader(config, tokenizer, split, repeat=False))))
        for split in ("train", "heldout")
    ]
    assert "".join(texts) == text
    assert len(texts[1]) == 50


def test_errors_in_documents_reach_the_caller(numbers: Tokenizer, number_config: ConfigMaker):
    config = number_config(LENGTHS)
    with open(config.files[0], "a") as file:
        file.write("{broken\n")
    loader = make_loader(config, numbers, "train", repeat=False)
    with pytest.raises(DataError, match=r"numbers\.jsonl:8: not a line of JSON"):
        list(loader)


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ({"default_shards": 3}, {}, "data.batch_size 4 does not divide by 3 data shards"),
        ({"rows": (3, 4)}, {}, r"rows are \[3, 4\]; use ascending indices from 0 to 3"),
        ({"rows": (1, 0)}, {}, r"rows are \[1, 0\]; use ascending indices from 0 to 3"),
        ({"rows": ()}, {}, r"rows are \[\]; use ascending indices from 0 to 3"),
        ({}, {"num_shards": 8, "batch_size": 8}, "7 documents are too few for 8 data shards"),
        ({}, {"num_workers": 9}, "7 documents are too few for 1 data shards with 9 workers"),
    ],
)
def test_invalid_arguments_are_rejected(
    numbers: Tokenizer, number_config: ConfigMaker, arguments: dict, settings: dict, message: str
):
    config = number_config(LENGTHS, **settings)
    with pytest.raises(DataError, match=message):
        make_loader(config, numbers, "train", repeat=True, **arguments)


@pytest.mark.parametrize("repeat", [False, True])
def test_data_without_a_token_is_an_error(
    numbers: Tokenizer, number_config: ConfigMaker, repeat: bool
):
    with pytest.raises(DataError, match="the 2 documents of split 'train' have no token"):
        make_loader(number_config([0, 0]), numbers, "train", repeat=repeat)


def test_a_closed_loader_raises(numbers: Tokenizer, number_config: ConfigMaker):
    loader = make_loader(number_config(LENGTHS), numbers, "train", repeat=True)
    next(loader)
    loader.close()
    loader.close()
    with pytest.raises(ValueError, match="the loader is closed"):
        next(loader)


@pytest.mark.slow
def test_worker_processes_load_the_same_batches_and_resume(tmp_path: Path):
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text(f"{i}{i} " * (20 + 17 * i))
    settings = {"source": "files", "files": (str(tmp_path / "*.txt"),), "heldout_fraction": 0.0}
    tokenizer = load_tokenizer("bytes")

    def load(num_workers: int) -> Loader:
        config = DataConfig(seq_len=16, batch_size=2, num_workers=num_workers, **settings)
        return make_loader(config, tokenizer, "train", repeat=True)

    inline, workers = load(0), load(1)
    _assert_same(_take(workers, 60), _take(inline, 60))
    state = json.loads(json.dumps(workers.state_dict()))
    expected = _take(workers, 20)
    assert {type(array) for batch in expected for array in batch} == {np.ndarray}
    workers.load_state_dict(state)
    _assert_same(_take(workers, 20), expected)
    workers.close()
    # In a thread too.
    inline.load_state_dict(state)
    _assert_same(_take(inline, 20), expected)
    inline.close()


def test_fast_enough_to_feed_an_accelerator(tmp_path: Path):
    text = "".join(f"line {i} of some text\n" for i in range(200_000))
    (tmp_path / "text.txt").write_text(text)
    config = DataConfig(source="files", files=(str(tmp_path / "text.txt"),), heldout_fraction=0.0)
    loader = make_loader(config, load_tokenizer("bytes"), "train", repeat=True)
    start = time.process_time()
    num_tokens = sum(next(loader).tokens.size for _ in range(500))
    seconds = time.process_time() - start
    loader.close()
    # Measured: 6 to 30 MB a second on one core.
    assert num_tokens / seconds > 2e6


def test_an_open_loader_prints_nothing_at_exit(tmp_path: Path):
    (tmp_path / "a.txt").write_text("text " * 100)
    code = (
        "from megalodon_jax.config import DataConfig\n"
        "from megalodon_jax.data import load_tokenizer, make_loader\n"
        f"config = DataConfig(source='files', files=({str(tmp_path / 'a.txt')!r},), seq_len=8)\n"
        "loader = make_loader(config, load_tokenizer('bytes'), 'train', repeat=True)\n"
        "counted = make_loader(config, load_tokenizer('bytes'), 'heldout', repeat=False)\n"
        "pair = next(loader), next(counted.with_bytes())\n"
    )
    done = _run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_needs_no_data_library():
    names = ("grain", "tensorflow_datasets", "pyarrow", "tokenizers", "sentencepiece")
    code = (
        "import sys\n"
        f"for name in {names!r}: sys.modules[name] = None\n"
        "import megalodon_jax.data as data\n"
        "from megalodon_jax.config import DataConfig\n"
        "assert data.load_tokenizer('bytes').decode([65]) == 'A'\n"
        "assert 'def ' in data.open_source(DataConfig(), 'train')[0].text\n"
    )
    done = _run_python(code)
    assert (done.returncode, done.stderr) == (0, "")


def _run_python(code: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=root, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


@pytest.mark.slow
def test_a_loader_can_be_collected_on_its_read_ahead_thread(
    numbers: Tokenizer, number_config: ConfigMaker, monkeypatch
):
    unused, collected = threading.Event(), threading.Event()
    encode = numbers.encode

    def collect_and_encode(text: str) -> np.ndarray:
        if threading.current_thread() is not threading.main_thread():
            assert unused.wait(timeout=60)
            gc.collect()
            collected.set()
        return encode(text)

    monkeypatch.setattr(numbers, "encode", collect_and_encode)
    before = set(threading.enumerate())
    loader = make_loader(number_config(LENGTHS), numbers, "train", repeat=True)
    for shard in loader._opened.values():
        shard._readers[0].start_prefetch()  # type: ignore[attr-defined]
    reader = weakref.ref(shard._readers[0])
    cycle: list = [loader]
    cycle.append(cycle)
    del loader, shard, cycle
    unused.set()
    assert collected.wait(timeout=60)
    # An error of the thread fails the test: warnings are errors.
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=60)
        assert not thread.is_alive()
    gc.collect()
    assert reader() is None
