"""Crafted .safetensors files, released checkpoint folders and TOML files."""

import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save as save_safetensors

from megalodon_jax.interop.safetensors_files import CONFIG_KEY
from tests.faults.hostile import Hostile, Special, refused
from tests.faults.hostile_torch import mutations
from tests.torch_files import write_torch_file

TINY: dict[str, Any] = {
    "num_layers": 1,
    "model_dim": 8,
    "z_dim": 4,
    "value_dim": 8,
    "num_heads": 1,
    "ffn_hidden_dim": 8,
    "cema_ndim": 2,
    "chunk_size": 16,
    "vocab_size": 257,
    "norm_num_groups": 2,
}
DEEP = "[" * 100_000
SPECIAL: tuple[Special, ...] = ("zero", "pipe", "directory")


def header(tensors: dict[str, Any], data: int = 16) -> bytes:
    """A file with this header and some data."""
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def tensor(dtype: str = "F32", shape: Any = (4,), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def with_config(config: str, name: str = "embed.weight") -> bytes:
    return header({"__metadata__": {CONFIG_KEY: config}, name: tensor()})


def _headers() -> dict[str, bytes]:
    model = {"model": TINY}
    huge = 2**62
    return {
        "empty": b"",
        "seven bytes": b"\1" * 7,
        "header of 0": bytes(8),
        "header of 2^63": struct.pack("<Q", 2**63) + b"{}",
        "header of 2^40": struct.pack("<Q", 2**40) + b"{}",
        "header past the end": struct.pack("<Q", 99) + b"{}",
        "header of 200 MB": struct.pack("<Q", 200_000_000) + b"{}",
        "no JSON": struct.pack("<Q", 5) + b"hello",
        "no UTF-8": struct.pack("<Q", 2) + b"\xff\xfe",
        "a list": struct.pack("<Q", 2) + b"[]",
        "deep": struct.pack("<Q", 100_000) + b"[" * 100_000,
        "no tensors": header({}),
        "tensor is a number": header({"a": 3}),
        "overlapping": header({"a": tensor(), "b": tensor(offsets=(8, 24))}, 24),
        "same range": header({"a": tensor(), "b": tensor()}),
        "gap": header({"a": tensor(), "b": tensor(offsets=(20, 36))}, 36),
        "past the end": header({"a": tensor(offsets=(0, 1600), shape=(400,))}),
        "backwards": header({"a": tensor(offsets=(16, 0))}),
        "offsets of 2^62": header({"a": tensor(offsets=(huge, huge + 16))}),
        "negative offset": header({"a": tensor(offsets=(-16, 0))}),
        "huge shape": header({"a": tensor(shape=(huge, huge))}),
        "shape wraps": header({"a": tensor(shape=(2**32, 2**32, 4))}),
        "negative shape": header({"a": tensor(shape=(-4,))}),
        "fractional shape": header({"a": tensor(shape=(4.5,))}),
        "shape and bytes differ": header({"a": tensor(shape=(5,))}),
        "70 axes": header({"a": tensor(shape=(1,) * 69 + (4,))}),
        "empty and huge": header({"a": tensor(shape=(0, 2**40), offsets=(0, 0))}, 0),
        "data without tensors": header({}, 64),
        "key twice": struct.pack("<Q", 122)
        + (
            b'{"a":'
            + json.dumps(tensor()).encode()
            + b',"a":'
            + json.dumps(tensor()).encode()
            + b"}"
        ).ljust(122)
        + bytes(16),
        "metadata is a list": header({"__metadata__": [1], "a": tensor()}),
        "metadata is a number": header({"__metadata__": {CONFIG_KEY: 3}, "a": tensor()}),
        "no config": header({"a": tensor()}),
        "config is no JSON": with_config("hello"),
        "config is a list": with_config("[1]"),
        "config is null": with_config("null"),
        "config is deep": with_config(DEEP),
        "config is a deep table": with_config('{"model":' * 50_000),
        "config of many digits": with_config('{"steps": ' + "9" * 5000 + "}"),
        "config with NaN": with_config('{"optim": {"lr": NaN}}'),
        "config of unknown keys": with_config('{"stepz": 3}'),
        "config of 10^6 layers": with_config(json.dumps({"model": {**TINY, "num_layers": 10**6}})),
        "config of 90,000 layers": with_config(
            json.dumps({"model": {**TINY, "num_layers": 90_000}})
        ),
        "config of huge sizes": with_config(
            json.dumps({"model": {**TINY, "vocab_size": 10**8, "model_dim": 10**6}})
        ),
        "config of a Transformer": with_config('{"model": {"kind": "transformer"}}'),
        "config of no kind": with_config('{"model": {"kind": ["megalodon"]}}'),
        "preset climbs": with_config('{"model": {"preset": "../../../etc/passwd"}}'),
        "preset is a list": with_config('{"model": {"preset": []}}'),
        "name with line breaks": with_config(json.dumps(model), "a\nb\x1b[31m\0c"),
        "name of 100,000": with_config(json.dumps(model), "n" * 100_000),
        "50,000 names": header(
            {"__metadata__": {CONFIG_KEY: json.dumps(model)}}
            | {f"t{i}": tensor(shape=(0,), offsets=(0, 0)) for i in range(50_000)},
            0,
        ),
    } | {
        f"dtype {dtype}": header(
            {
                "__metadata__": {CONFIG_KEY: json.dumps(model)},
                "embed.weight": tensor(dtype, shape=(16 * 8 // bits,)),
            }
        )
        for dtype, bits in {
            "F4": 4,
            "F8_E4M3": 8,
            "F8_E5M2": 8,
            "F8_E8M0": 8,
            "C64": 64,
            "BOOL": 8,
            "U64": 64,
            "BF16": 16,
            "F128": 128,
            "": 32,
        }.items()
    }


def _full_model(dtype: Any) -> bytes:
    """Every entry of a tiny model, of one dtype."""
    from megalodon_jax.config import ModelConfig
    from megalodon_jax.interop.released import released_entries

    outside, per_block = released_entries(ModelConfig(**TINY))
    arrays = {
        entry.name.format(0): np.zeros(entry.shape, dtype)
        for entry in (*outside, *per_block)
        if entry.path
    }
    return save_safetensors(arrays, {CONFIG_KEY: json.dumps({"model": TINY})})


def safetensors_files(random_count: int, seed: int = 0) -> list[Hostile]:
    """Crafted headers, and random mutations of a valid file."""
    found = [refused("safetensors", name, content) for name, content in _headers().items()]
    found += [refused("safetensors", name, name) for name in SPECIAL]
    for dtype in (np.int32, np.bool_, np.uint64):
        name = f"all of {np.dtype(dtype)}"
        found.append(refused("safetensors", name, _full_model(dtype)))
    return found + mutations("safetensors", _full_model(np.float32), random_count, seed)


def _torch_bytes(tensors: dict[str, np.ndarray]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.pth")
        write_torch_file(path, tensors)
        return path.read_bytes()


def released_folders() -> list[Hostile]:
    """Folders with a damaged config.json, or shards that do not fit together."""
    weights = {"embed.weight": np.ones((4, 6), np.float32)}
    shard, other = _torch_bytes(weights), _torch_bytes({"embed.weight": np.ones((3,), np.float32)})
    configs = {
        "empty": b"",
        "no JSON": b"hello",
        "no UTF-8": b"\xff\xfe",
        "a list": b"[]",
        "a number": b"3",
        "deep": DEEP.encode(),
        "digits": b'{"model": ' + b"9" * 5000 + b"}",
        "model is a text": b'{"model": "abc"}',
        "model is a list": b'{"model": [1]}',
        "NUL": b'{"model": {"num_layers": 1\0}}',
        "layers are a text": b'{"model": {"num_layers": "1"}}',
        "NaN": b'{"model": {"norm_eps": NaN}}',
        "infinite": b'{"model": {"rope_base": Infinity}}',
        "unknown key": b'{"model": {"__class__": 1}}',
        "10^6 layers": b'{"model": {"num_layers": 1000000}}',
        "90,000 layers": json.dumps({"model": {**TINY, "num_layers": 90_000}}).encode(),
        "1e23 layers": b'{"model": {"num_layers": 1e23}}',
    }
    found = [
        refused("released", f"config: {name}", {"config.json": text, "consolidated.pth": shard})
        for name, text in configs.items()
    ]
    good = json.dumps({"model": TINY}).encode()
    for name, shards in {
        "shapes differ": [shard, other],
        "an axis is missing": [other, other],
        "one is no zip": [shard, b"hello"],
        "entries differ": [shard, _torch_bytes({"x": np.ones(3, np.float32)})],
    }.items():
        content = {f"consolidated.{i:02d}.pth": text for i, text in enumerate(shards)}
        found.append(refused("released", f"shards: {name}", {"config.json": good, **content}))
    return found


def config_files(random_count: int, seed: int = 0) -> list[Hostile]:
    """TOML that is damaged, deep, long, or has values of the wrong kind."""
    texts = {
        "no TOML": b"hello",
        "no UTF-8": b"\xff\xfe",
        "NUL": b"steps = 1\0",
        "deep list": b"steps = " + b"[" * 100_000,
        "deep table": b"[" + b"a." * 50_000 + b"b]",
        "deep inline": b"a = " + b"{a = " * 100_000,
        "digits": b"steps = " + b"9" * 5000,
        "hexadecimal digits": b"steps = 0x" + b"f" * 5000,
        "key of 500,000": b"k" * 500_000 + b" = 1",
        "2 MB": b"#" * 2_000_000,
        "table is a list": b"model = [1]",
        "list of tables": b"[[model]]\nnum_layers = 1",
        "date": b"steps = 1979-05-27",
        "infinite": b"[optim]\nlr = inf",
        "NaN": b"[optim]\nlr = nan",
        "1e23": b"steps = 1e23",
        "1e400": b"[optim]\nlr = 1e400",
        "text for a list": b"[data]\nfiles = 'abc'",
        "table for a list": b"[data]\nfiles = {a = 1}",
        "number in a list": b"[data]\nfiles = [1]",
        "table for a text": b"run_dir = {a = 1}",
        "list for a choice": b"[model]\nremat = ['none']",
        "list for a kind": b"[model]\nkind = []",
        "number for a preset": b"[model]\npreset = 3",
        "preset climbs": b"[mesh]\npreset = '../../x'",
        "class": b"__class__ = 1",
        "100,000 keys": b"".join(b"k%d = 1\n" % i for i in range(60_000)),
        "zero heads": b"[model]\nnum_heads = 0",
        "negative dims": b"[model]\nmodel_dim = -8",
        "port": b"[processes]\ncoordinator = 'a:99999'\ncount = 2\nindex = 0",
        "NUL in a path": b'run_dir = "a\\u0000b"',
    }
    found = [refused("config", name, text) for name, text in texts.items()]
    found += [refused("config", name, name) for name in (*SPECIAL, "sparse")]
    valid = b"steps = 300\n[optim]\nlr = 1e-3\nbeta1 = 0.9\n[data]\nfiles = ['a.txt']\n"
    valid += b"[model]\nz_dim = 64\n"
    return found + mutations("config", valid, random_count, seed)
