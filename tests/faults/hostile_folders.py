"""Crafted folders of the Hugging Face form."""

import json

import numpy as np
from safetensors.numpy import save as save_safetensors

from tests.faults.hostile import Hostile, refused
from tests.faults.hostile_tables import DEEP, TINY


def huggingface_folders() -> list[Hostile]:
    """Folders with a damaged configuration, index or file of weights."""
    weights = save_safetensors({"embed.weight": np.ones((257, 8), np.float32)}, {"format": "pt"})
    sizes = {"model_type": "megalodon", **TINY}
    configs = {
        "weights are missing": sizes,
        "layers are a text": {**sizes, "num_layers": "1"},
        "layers are a list": {**sizes, "num_layers": [1]},
        "90,000 layers": {**sizes, "num_layers": 90_000},
        "1e23 layers": {**sizes, "num_layers": 1e23},
        "dtype is a list": {**sizes, "torch_dtype": ["float32"]},
        "dtype float16": {**sizes, "torch_dtype": "float16"},
        "infinite base": {**sizes, "rope_base": float("inf")},
        "type is a list": {**sizes, "model_type": ["megalodon"]},
    }
    found = [
        _folder(f"config: {name}", json.dumps(table).encode(), {"model.safetensors": weights})
        for name, table in configs.items()
    ]
    good = json.dumps(sizes).encode()
    indices = {
        "empty": b"",
        "a list": b"[]",
        "deep": DEEP.encode(),
        "weight_map is a list": b'{"weight_map": ["model.safetensors"]}',
        "a file outside": b'{"weight_map": {"embed.weight": "../../model.safetensors"}}',
        "an absolute file": b'{"weight_map": {"embed.weight": "/etc/model.safetensors"}}',
        "a missing file": b'{"weight_map": {"embed.weight": "other.safetensors"}}',
        "NUL": b'{"weight_map": {"embed.weight": "a\\u0000.safetensors"}}',
        "a number": b'{"weight_map": {"embed.weight": 7}}',
        "entries differ": b'{"weight_map": {"norm.weight": "model.safetensors"}}',
    }
    for name, index in indices.items():
        files = {"model.safetensors": weights, "model.safetensors.index.json": index}
        found.append(_folder(f"index: {name}", good, files))
    for name, content in {
        "no safetensors": b"hello",
        "cut off": weights[:-9],
        "empty": b"",
    }.items():
        found.append(_folder(f"weights: {name}", good, {"model.safetensors": content}))
    return found


def _folder(name: str, config: bytes, files: dict[str, bytes]) -> Hostile:
    return refused("huggingface", name, {"config.json": config, **files})
