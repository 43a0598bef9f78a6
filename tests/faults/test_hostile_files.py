"""Hostile files end in one clear line: no code, crash, hang, bomb or traceback.

The long form is a command: `python -m tests.faults.hostile_files --count 200`.
"""

import sys

import numpy as np
import pytest

from megalodon_jax.errors import DataError, TorchFileError, one_line
from megalodon_jax.file_limits import LIMITS_VARIABLE, FileLimitError, check_size, read_bytes
from megalodon_jax.interop.torch_file import read_torch_file
from tests.faults import hostile_torch as torch
from tests.faults.hostile import Hostile, Runner, Verdict
from tests.faults.hostile_folders import huggingface_folders
from tests.faults.hostile_tables import config_files, released_folders, safetensors_files
from tests.faults.hostile_texts import text_files, tokenizer_files
from tests.faults.hostile_torch import torch_files

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
SHORT_FORM = {
    "torch": (
        "pickle: size is a tensor", "pickle: size and stride wrap as bytes",
        "pickle: stride 0 expands", "pickle: stride wraps to 1",
        "pickle: offset of 2^64", "pickle: memo 2^28", "pickle: deep key",
        "pickle: calls os.system", "pickle: calls builtins.exec", "pickle: storage key a deep list",
        "zip: storage bomb", "zip: size of 4 GB", "mutation 1: truncate",
    ),
    "safetensors": (
        "config is deep", "config of 90,000 layers", "config of many digits", "dtype F8_E4M3",
        "name with line breaks", "all of bool", "pipe",
    ),
    "released": ("config: deep", "config: model is a text", "shards: shapes differ"),
    "huggingface": ("config: layers are a text", "index: a file outside", "weights: cut off"),
    "config": ("deep list", "digits", "zero", "100,000 keys", "text for a list"),
    "tokenizers": ("zero", "charsmap is short", "charsmap is damaged", "boundary tokens: deep"),
    "sentencepiece": ("pipe", "empty", "half"),
    "jsonl": ("half a line",),
    "gzip": ("half",),
    "parquet": ("half",),
}  # fmt: skip


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory) -> list[Verdict]:
    """Verdicts on the short form, from one process."""
    folder = tmp_path_factory.mktemp("hostile")
    every = [
        *torch_files(folder, 2), *safetensors_files(0), *released_folders(), *config_files(0),
        *huggingface_folders(), *tokenizer_files(0), *text_files(0),
    ]  # fmt: skip
    chosen = [file for file in every if file.name in SHORT_FORM.get(file.kind, ())]
    assert len(chosen) == sum(map(len, SHORT_FORM.values()))
    return Runner(folder / "files").run(chosen)


@pytest.mark.slow
def test_every_hostile_file_ends_in_a_clear_error(verdicts: list[Verdict]):
    assert [str(verdict) for verdict in verdicts if verdict.is_fault] == []


@pytest.mark.slow
def test_errors_name_the_entry(verdicts: list[Verdict]):
    messages = {verdict.file.name: verdict.message for verdict in verdicts}
    for name in SHORT_FORM["torch"][:4]:
        assert "entry 'embed.weight'" in messages[name]
    assert "os.system" in messages["pickle: calls os.system"]
    assert "entry 'embed.weight' of dtype F8_E4M3" in messages["dtype F8_E4M3"]
    assert "90,000 layers" in messages["config of 90,000 layers"]


@pytest.mark.slow
def test_the_runner_detects_what_it_must(tmp_path):
    # A file that is accepted although it must not be.
    (accepted,) = Runner(tmp_path).run([Hostile("config", "valid", b"steps = 200", True)])
    assert accepted.outcome == "accepted"
    assert accepted.is_fault
    assert Verdict(accepted.file, "ends in ValueError", "a message").is_fault
    assert Verdict(accepted.file, "refused", "two\nlines of text").is_fault


def test_messages_of_libraries_are_printable():
    assert one_line(OSError("line\nof \x1b[31m\0text")) == "line of \\x1b[31m\\x00text"


def write(path, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0):
    """A file with one tensor of a storage of four elements: 0, 1, 2, 3."""
    pickled = torch.entry(
        torch.tensor(
            offset=torch.integer(offset),
            size=torch.tuple_of(*map(torch.integer, size)),
            stride=torch.tuple_of(*map(torch.integer, stride)),
        )
    )
    path.write_bytes(torch.zipped(pickled))
    return path


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((4,), (1,), 0), ((2, 2), (1, 2), 0), ((2,), (2,), 1), ((), (), 3), ((1, 2), (2**70, 1), 2),
        ((0,), (1,), 4), ((2, 0), (0, 1), 0),
    ],
)  # fmt: skip
def test_tensors_inside_their_storage_are_read(tmp_path, size, stride, offset):
    array = read_torch_file(write(tmp_path / "x.pt", size, stride, offset))["embed.weight"]
    # From the definition: element i is at offset + sum of index * stride.
    expected = np.zeros(size, np.float32)
    for index in np.ndindex(*size):
        expected[index] = offset + sum(i * step for i, step in zip(index, stride, strict=True))
    np.testing.assert_array_equal(array, expected)
    assert array.dtype == np.float32


def test_no_tensor_reaches_outside_its_storage(tmp_path):
    accepted = 0
    for n in range(6):
        for step in range(4):
            for offset in range(6):
                path = write(tmp_path / "x.pt", (n,), (step,), offset)
                is_inside = n == 0 or (offset + (n - 1) * step < 4 and n <= 4)
                try:
                    array = read_torch_file(path)["embed.weight"]
                except TorchFileError:
                    assert not is_inside
                    continue
                accepted += 1
                assert is_inside
                assert array.tolist() == [offset + i * step for i in range(n)]
    assert accepted > 40


def test_limits_are_raised_by_the_environment(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(bytes(1000))
    with pytest.raises(
        FileLimitError, match=r"1,000 bytes, more than the limit of 999.*_LIMITS=10"
    ):
        read_bytes(path, max_bytes=999)
    monkeypatch.setenv(LIMITS_VARIABLE, "2.5")
    assert read_bytes(path, max_bytes=400) == bytes(1000)
    with pytest.raises(FileLimitError):
        check_size(1001, 400)
    monkeypatch.setenv(LIMITS_VARIABLE, "much")
    with pytest.raises(FileLimitError, match="is 'much'; use a factor such as 10"):
        read_bytes(path, max_bytes=400)


def test_a_large_tokenizer_is_allowed_by_the_setting(tmp_path, monkeypatch):
    from megalodon_jax.data import load_tokenizer, tokenizer
    from tests.faults.hostile_texts import tokenizer_json

    path = tmp_path / "tokenizer.json"
    path.write_bytes(tokenizer_json())
    monkeypatch.setattr(tokenizer, "MAX_TOKENIZER_BYTES", 100)
    with pytest.raises(DataError, match="more than the limit of 100"):
        load_tokenizer(str(path))
    monkeypatch.setenv(LIMITS_VARIABLE, "100")
    assert load_tokenizer(str(path)).vocab_size == 6
