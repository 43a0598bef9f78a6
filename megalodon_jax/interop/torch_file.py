"""Reader of torch.save files, without torch and without executing code from the file."""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from megalodon_jax.errors import TorchFileError

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


class _StorageType(NamedTuple):
    dtype: Any


def read_torch_file(path: str | Path) -> dict[str, np.ndarray]:
    """Reads a state dict saved by torch (1.6 or later) as numpy arrays.

    Only tensors, containers and plain values are accepted: a pickle that refers to any other class
    is rejected, so a malicious file cannot execute code. bfloat16 arrays have the dtype of
    ml_dtypes.

    Raises:
      TorchFileError: the file is not a torch.save file, or has other contents; the message names
        them.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickled = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(pickled) != 1:
                raise TorchFileError(
                    f"{path} is a zip file without data.pkl; give a file saved by torch.save"
                )
            with archive.open(pickled[0]) as file:
                unpickler = _TensorUnpickler(file, archive, pickled[0].removesuffix("data.pkl"))
                content = unpickler.load()
    except OSError as error:
        raise TorchFileError(f"cannot read {path}: {error.strerror}") from error
    except zipfile.BadZipFile as error:
        raise TorchFileError(
            f"{path} is not in the zip format of torch.save (torch 1.6 or later): {error}"
        ) from error
    except pickle.UnpicklingError as error:
        raise TorchFileError(f"{path}: {error}") from error
    if not isinstance(content, dict) or not all(
        isinstance(value, np.ndarray) for value in content.values()
    ):
        raise TorchFileError(f"{path} has a {type(content).__name__}; save a dict of tensors")
    return dict(content)


class _TensorUnpickler(pickle.Unpickler):
    def __init__(self, file: Any, archive: zipfile.ZipFile, prefix: str):
        super().__init__(file)
        self._archive = archive
        self._prefix = prefix

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _rebuild_parameter
        if module == "torch" and name in _STORAGE_DTYPES:
            return _StorageType(_STORAGE_DTYPES[name])
        raise pickle.UnpicklingError(
            f"the file refers to {module}.{name}; only tensors are accepted"
        )

    def persistent_load(self, pid: Any) -> np.ndarray:
        kind, storage, key, _location, count = pid
        if kind != "storage" or not isinstance(storage, _StorageType):
            raise pickle.UnpicklingError(f"unknown kind of stored object {kind!r}")
        data = self._archive.read(f"{self._prefix}data/{key}")
        return np.frombuffer(data, dtype=storage.dtype, count=count)


def _rebuild_tensor(
    storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_unused: Any
) -> np.ndarray:
    last = offset + sum((n - 1) * step for n, step in zip(size, stride)) if all(size) else offset
    if offset < 0 or any(step < 0 for step in stride) or last >= max(storage.size, 1):
        raise pickle.UnpicklingError(f"a tensor of shape {size} exceeds its storage")
    strides = tuple(step * storage.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides).copy()


def _rebuild_parameter(data: np.ndarray, *_unused: Any) -> np.ndarray:
    return data
