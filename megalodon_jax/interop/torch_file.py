"""Reader of torch.save files, without torch and without executing code from the file."""

import math
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from megalodon_jax.errors import TorchFileError
from megalodon_jax.file_limits import (
    MAX_EXPANSION,
    FileLimitError,
    check_regular,
    check_size,
    scaled,
)
from megalodon_jax.interop.torch_pickle import Global, PickleMachine

MAX_PICKLE_BYTES = 2_000_000
"""Bytes of data.pkl: some 10,000 tensors."""
_STORAGE_DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
# NumPy's largest number of axes.
_MAX_AXES = 64
_MAX_AXIS = 2**31


class _Storage(NamedTuple):
    """The values of one storage of the file, one axis."""

    values: np.ndarray


def read_torch_file(path: str | Path) -> dict[str, np.ndarray]:
    """Reads a state dict saved by torch (1.6 or later) as numpy arrays.

    Only tensors, containers and plain values are accepted: a pickle that refers to any other class
    is rejected, so a malicious file cannot execute code. A tensor must lie in its storage and have
    no more elements than it, so that a small file cannot become large arrays. The arrays are views
    of the storages, read only. bfloat16 arrays have the dtype of ml_dtypes.

    Raises:
      TorchFileError: the file is not a torch.save file, or has other contents; the message names
        them.
    """
    try:
        num_bytes = check_regular(path)
        with zipfile.ZipFile(path) as archive:
            content = _Reader(archive, num_bytes).read()
    except OSError as error:
        raise TorchFileError(f"cannot read {path}: {error.strerror or error}") from error
    except FileLimitError as error:
        raise TorchFileError(f"cannot read {path}: {error}") from error
    except TorchFileError as error:
        raise TorchFileError(f"{path}: {error}") from error
    # RuntimeError and its subclass NotImplementedError: encrypted entries, unknown compression.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        raise TorchFileError(
            f"{path} is not in the zip format of torch.save (torch 1.6 or later): {error}"
        ) from error
    if type(content) is not dict:
        raise TorchFileError(f"{path} has a {type(content).__name__}; save a dict of tensors")
    for name, value in content.items():
        if type(name) is not str or not isinstance(value, np.ndarray):
            raise TorchFileError(
                f"{path}: entry {name!r:.80} is a {type(value).__name__}; save a dict of tensors"
            )
    return content


class _Reader:
    """The state dict of one archive."""

    def __init__(self, archive: zipfile.ZipFile, num_bytes: int):
        self._archive = archive
        self._storages: dict[tuple[str, str], _Storage] = {}
        entries = archive.infolist()
        self._entries = {entry.filename: entry for entry in entries}
        _check_archive(entries, num_bytes)
        pickled = [name for name in self._entries if name.endswith("/data.pkl")]
        if len(pickled) != 1:
            raise TorchFileError("a zip file without data.pkl; give a file saved by torch.save")
        self._prefix = pickled[0].removesuffix("data.pkl")

    def read(self) -> Any:
        """The object that was saved."""
        order = f"{self._prefix}byteorder"
        if order in self._entries and self._archive.read(order).strip() != b"little":
            raise TorchFileError("the byte order is not little; save it on a little-endian machine")
        name = f"{self._prefix}data.pkl"
        check_size(self._entries[name].file_size, MAX_PICKLE_BYTES, name[-80:])
        return PickleMachine(self._call, self._load_storage).run(self._archive.read(name))

    def _call(self, function: Global, arguments: tuple[Any, ...]) -> Any:
        if function == ("collections", "OrderedDict") and not arguments:
            return {}
        if function == ("torch._utils", "_rebuild_tensor_v2") and len(arguments) >= 4:
            return _tensor(*arguments[:4])
        if function == ("torch._utils", "_rebuild_parameter") and arguments:
            if not isinstance(arguments[0], np.ndarray):
                raise TorchFileError("a parameter is not made of a tensor")
            return arguments[0]
        raise TorchFileError(f"the file refers to {function!s:.160}; only tensors are accepted")

    def _load_storage(self, identity: Any) -> _Storage:
        if type(identity) is not tuple or len(identity) != 5 or identity[0] != "storage":
            raise TorchFileError("the file refers to an object that is no storage")
        _, kind, key, _location, count = identity
        if type(kind) is not Global or kind.module != "torch" or kind.name not in _STORAGE_DTYPES:
            raise TorchFileError(f"unknown kind of storage: {_shown(kind)}")
        entry = self._entries.get(f"{self._prefix}data/{key}") if type(key) is str else None
        if entry is None:
            raise TorchFileError(f"the file has no storage {_shown(key)}")
        known = self._storages.get((key, kind.name))
        if known is None:
            dtype = np.dtype(_STORAGE_DTYPES[kind.name])
            if entry.file_size % dtype.itemsize:
                raise TorchFileError(
                    f"storage {key!r:.80} has {entry.file_size:,} bytes, not a multiple of "
                    f"{dtype.itemsize}"
                )
            known = _Storage(np.frombuffer(self._archive.read(entry), dtype))
            self._storages[key, kind.name] = known
        if type(count) is not int or not 0 <= count <= known.values.size:
            raise TorchFileError(
                f"storage {key!r:.80} declares {_shown(count)} elements and has "
                f"{known.values.size:,}"
            )
        return _Storage(known.values[:count])


def _check_archive(entries: list[zipfile.ZipInfo], num_bytes: int) -> None:
    """Raises `TorchFileError` for duplicates, and for entries that do not fit the file's size."""
    if len({entry.filename for entry in entries}) < len(entries):
        raise TorchFileError("an entry of the zip file is there twice")
    for entry in entries:
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise TorchFileError(f"entry {entry.filename!r:.80} has an unknown compression")
        if entry.flag_bits & 1:
            raise TorchFileError(f"entry {entry.filename!r:.80} is encrypted")
        if entry.compress_type == zipfile.ZIP_STORED and entry.file_size != entry.compress_size:
            raise TorchFileError(f"entry {entry.filename!r:.80} has two different sizes")
        limit = scaled(MAX_EXPANSION) * max(entry.compress_size, 1000)
        check_size(entry.file_size, limit, f"entry {entry.filename!r:.80}, decompressed,")
    if sum(entry.compress_size for entry in entries) > num_bytes:
        raise TorchFileError("entries of the zip file overlap: together they exceed the file")


def _tensor(storage: Any, offset: Any, size: Any, stride: Any) -> np.ndarray:
    """A view of a storage; the arithmetic is that of Python's integers, which cannot overflow."""
    if type(storage) is not _Storage:
        raise TorchFileError("a tensor is not made of a storage")
    if type(size) is not tuple or type(stride) is not tuple or len(size) != len(stride):
        raise TorchFileError("a tensor's size and stride are not tuples of one length")
    if any(type(number) is not int or number < 0 for number in (offset, *size, *stride)):
        raise TorchFileError("a tensor's offset, size or stride is not a whole number of 0 or more")
    available = storage.values.size
    if len(size) > _MAX_AXES or max(size, default=0) > max(available, _MAX_AXIS):
        raise TorchFileError(f"a tensor has {len(size)} axes, the longest {_shown(max(size))}")
    num_elements = math.prod(size)
    if num_elements == 0 and math.prod(max(n, 1) for n in size) < _MAX_AXIS:
        return np.zeros(size, storage.values.dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if last >= available or num_elements > available or num_elements == 0:
        raise TorchFileError(
            f"a tensor of shape {size!s:.80} exceeds its storage of {available:,} elements"
        )
    itemsize = storage.values.itemsize
    # A stride of an axis of length 1 is never used, and may be too large for NumPy.
    strides = tuple(step * itemsize if n > 1 else 0 for n, step in zip(size, stride, strict=True))
    return np.lib.stride_tricks.as_strided(storage.values[offset:], size, strides, writeable=False)


def _shown(value: Any) -> str:
    """A value of the file in a message; containers may be nested too deeply to be written."""
    if isinstance(value, Global | str):
        return f"{value!r:.80}" if isinstance(value, str) else f"{value!s:.80}"
    return f"{value:,}" if type(value) is int and abs(value) < 10**30 else type(value).__name__
