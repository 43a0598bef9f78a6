"""Sharded `.safetensors` files with an index, as `transformers` reads and writes them."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from megalodon_jax.errors import ConvertError
from megalodon_jax.file_limits import MAX_METADATA_BYTES, read_bytes
from megalodon_jax.interop.safetensors_files import Arrays, read_arrays

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def write_shards(
    arrays: Mapping[str, np.ndarray],
    folder: Path,
    *,
    metadata: Mapping[str, str],
    max_shard_bytes: int,
) -> list[str]:
    """Writes arrays to one file, or to several with an index.

    Args:
      arrays: by name.
      folder: an existing folder.
      metadata: of every file.
      max_shard_bytes: most bytes of arrays in a file; a larger array has a file of its own.

    Returns:
      The names of the files.
    """
    groups: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, array in arrays.items():
        if groups[-1] and size + array.nbytes > max_shard_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = array
        size += array.nbytes
    # transformers accepts only files whose framework it knows.
    stored = {**metadata, "format": "pt"}
    if len(groups) == 1:
        save_file(groups[0], str(folder / SINGLE_FILE), metadata=stored)
        return [SINGLE_FILE]
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    for name, group in zip(names, groups, strict=True):
        save_file(group, str(folder / name), metadata=stored)
    index = {
        "metadata": {"total_size": sum(array.nbytes for array in arrays.values())},
        "weight_map": {
            entry: name for name, group in zip(names, groups, strict=True) for entry in group
        },
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*names, INDEX_FILE]


def read_shards(folder: Path) -> Arrays:
    """All arrays of a folder, and the metadata of its first file.

    Raises:
      ConvertError: the folder has no weights, the index is not one, a file is missing or damaged,
        or has other entries than the index says.
    """
    if not (folder / INDEX_FILE).exists():
        if not (folder / SINGLE_FILE).exists():
            raise ConvertError(
                f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; give a folder with weights"
            )
        return read_arrays(folder / SINGLE_FILE)
    weight_map = _read_weight_map(folder / INDEX_FILE)
    arrays: dict[str, np.ndarray] = {}
    metadata: dict[str, str] = {}
    for number, name in enumerate(sorted(set(weight_map.values()))):
        shard = read_arrays(folder / name)
        expected = {entry for entry, file in weight_map.items() if file == name}
        if differing := sorted(expected ^ shard.by_name.keys()):
            raise ConvertError(
                f"{folder / name} and {INDEX_FILE} differ in {len(differing)} entries, the first "
                f"is {differing[0]!r:.80}; use files of one model"
            )
        arrays |= shard.by_name
        metadata = shard.metadata if number == 0 else metadata
    return Arrays(arrays, metadata)


def _read_weight_map(path: Path) -> dict[str, str]:
    try:
        index = json.loads(read_bytes(path, max_bytes=MAX_METADATA_BYTES).decode("utf-8"))
        weight_map = index["weight_map"]
        entries = {str(name): str(file) for name, file in weight_map.items()}
    # ValueError: not UTF-8, not JSON, too large; RecursionError: of nested brackets.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConvertError(f"cannot read {path} as an index of weights: {error!r:.200}") from error
    for file in entries.values():
        # A name from a file: nothing outside the folder is read.
        is_name = file.isprintable() and Path(file).name == file
        if not is_name or not file.endswith(".safetensors"):
            raise ConvertError(f"{path} names the file {file!r:.80}; it must be one of the folder")
    return entries
