"""Crafted torch.save files: pickles written opcode by opcode, and variants of the zip format."""

import io
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.faults.hostile import Hostile, refused
from tests.torch_files import write_torch_file

Bytes = bytes
HEAD, TAIL = b"\x80\x02}(", b"u."


def text(value: str) -> Bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value: int) -> Bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    encoded = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(encoded)]) + encoded


def tuple_of(*items: Bytes) -> Bytes:
    return b"(" + b"".join(items) + b"t"


def storage(
    kind: str = "FloatStorage", *, key: Bytes | None = None, count: Bytes | None = None
) -> Bytes:
    kind_global = f"ctorch\n{kind}\n".encode()
    key, count = key or text("0"), count or integer(4)
    return tuple_of(text("storage"), kind_global, key, text("cpu"), count) + b"Q"


def tensor(
    *,
    data: Bytes | None = None,
    offset: Bytes | None = None,
    size: Bytes | None = None,
    stride: Bytes | None = None,
) -> Bytes:
    body = tuple_of(
        data or storage(),
        offset or integer(0),
        size or tuple_of(integer(4)),
        stride or tuple_of(integer(1)),
        b"\x89",
        b"ccollections\nOrderedDict\n)R",
    )
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + body + b"R"


def _byte(at: int) -> Bytes:
    """A tensor that is one byte of the storage of 0, 1, 2, 3 in float32: 128 at 6, 63 at 7."""
    data = storage("ByteStorage", count=integer(16))
    return tensor(data=data, offset=integer(at), size=tuple_of(), stride=tuple_of())


def entry(value: Bytes, name: str = "embed.weight") -> Bytes:
    return HEAD + text(name) + value + TAIL


def zipped(pickled: Bytes, *, compression: int = zipfile.ZIP_STORED) -> Bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("model/data.pkl", pickled)
        archive.writestr("model/data/0", np.arange(4, dtype=np.float32).tobytes())
    return buffer.getvalue()


def _pickles(canary: str) -> dict[str, Bytes]:
    """Pickles, each of which is to be refused."""
    one, command = integer(1), f"touch {canary}"
    deep = b")" + b"\x85" * 300_000
    call = b"(" + text(command) + b"tR"
    return {
        "size is a tensor": entry(tensor(size=tuple_of(tensor()))),
        "stride is a tensor": entry(tensor(stride=tuple_of(tensor()))),
        # In the arithmetic of bytes 62 * 128 is 0: the end seems to lie in the storage.
        "size and stride wrap as bytes": entry(
            tensor(size=tuple_of(_byte(7)), stride=tuple_of(_byte(6)))
        ),
        "offset is a tensor": entry(tensor(offset=tensor())),
        "size tuple is a tensor": entry(tensor(size=tensor())),
        "size is a bool": entry(tensor(size=tuple_of(b"\x88"))),
        "stride is a float": entry(tensor(stride=tuple_of(b"G" + struct.pack(">d", 1.0)))),
        "size is none": entry(tensor(size=b"N")),
        "negative offset": entry(tensor(offset=integer(-1))),
        "negative stride": entry(tensor(stride=tuple_of(integer(-1)))),
        "negative size": entry(tensor(size=tuple_of(integer(-4)))),
        "stride of 2^62": entry(tensor(stride=tuple_of(integer(2**62)))),
        "stride of 2^63": entry(tensor(stride=tuple_of(integer(2**63)))),
        "offset of 2^64": entry(tensor(offset=integer(2**64))),
        "stride wraps to 1": entry(tensor(stride=tuple_of(integer(2**64 + 1)))),
        "size of 2^200": entry(tensor(size=tuple_of(integer(2**200)))),
        "size past the end": entry(tensor(size=tuple_of(integer(5)))),
        "offset past the end": entry(tensor(offset=integer(4))),
        "stride 0 expands": entry(
            tensor(size=tuple_of(integer(2**29)), stride=tuple_of(integer(0)))
        ),
        "two axes of stride 0": entry(
            tensor(size=tuple_of(*[integer(2**14)] * 2), stride=tuple_of(*[integer(0)] * 2))
        ),
        "size and stride differ": entry(tensor(size=tuple_of(one, one))),
        "70 axes": entry(tensor(size=tuple_of(*[one] * 70), stride=tuple_of(*[one] * 70))),
        "empty and huge": entry(
            tensor(size=tuple_of(integer(0), integer(2**62)), stride=tuple_of(one, one))
        ),
        "storage count 2^40": entry(tensor(data=storage(count=integer(2**40)))),
        "storage count -1": entry(tensor(data=storage(count=integer(-1)))),
        "storage count text": entry(tensor(data=storage(count=text("4")))),
        "storage of double": entry(tensor(data=storage("DoubleStorage"))),
        "storage of unknown kind": entry(tensor(data=storage("ComplexFloatStorage"))),
        "storage key absent": entry(tensor(data=storage(key=text("7")))),
        "storage key climbs": entry(tensor(data=storage(key=text("../../../../etc/passwd")))),
        "storage key a number": entry(tensor(data=storage(key=integer(0)))),
        "storage key a list": entry(tensor(data=storage(key=b"]"))),
        "storage is a dict": entry(tensor(data=b"}")),
        "storage key a deep list": entry(tensor(data=storage(key=b"]" * 3000 + b"a" * 2999))),
        "storage kind a deep list": entry(
            tensor(data=tuple_of(text("storage"), deep, text("0"), text("cpu"), one) + b"Q")
        ),
        "storage id short": entry(tensor(data=tuple_of(text("storage")) + b"Q")),
        "storage id text": entry(tensor(data=text("storage") + b"Q")),
        "storage id line": entry(b"P0\n"),
        "calls os.system": entry(b"cos\nsystem\n" + call),
        "calls posix.system": entry(b"cposix\nsystem\n" + call),
        "calls builtins.exec": entry(
            b"cbuiltins\nexec\n" + tuple_of(text(f"open({canary!r}, 'w')")) + b"R"
        ),
        "calls by stack global": entry(text("os") + text("system") + b"\x93" + call),
        "calls by inst": entry(b"(" + text(command) + b"ios\nsystem\n"),
        "calls by obj": entry(b"(cos\nsystem\n" + text(command) + b"o"),
        "calls by newobj": entry(b"csubprocess\nPopen\n" + tuple_of(text(command)) + b"\x81"),
        "calls by extension": entry(b"\x82\x01"),
        "calls torch.load": entry(b"ctorch\nload\n" + call),
        "calls OrderedDict with text": entry(b"ccollections\nOrderedDict\n" + call),
        "calls a storage type": entry(b"ctorch\nFloatStorage\n" + call),
        "calls a tensor": entry(tensor() + b")R"),
        "rebuild without arguments": entry(b"ctorch._utils\n_rebuild_tensor_v2\n)R"),
        "parameter of text": entry(b"ctorch._utils\n_rebuild_parameter\n" + call),
        "state of a tensor": entry(tensor() + tuple_of(one, tuple_of(integer(2**40))) + b"b"),
        "state of a class": entry(b"ctorch\nFloatStorage\n}b"),
        "memo 2^28": entry(text("x") + b"r" + struct.pack("<I", 2**28) + b"j" + b"\0\0\0\0"),
        "memo 2^32": entry(text("x") + b"r" + struct.pack("<I", 2**32 - 1)),
        "memo absent": entry(b"h\x07"),
        "deep key": HEAD + deep + tensor() + TAIL,
        "deep value": entry(deep),
        "deep lists": entry(b"]" * 300_000 + b"a" * 299_999),
        "key is none": HEAD + b"N" + tensor() + TAIL,
        "key is a number": HEAD + one + tensor() + TAIL,
        "key is a tensor": HEAD + tensor() + tensor() + TAIL,
        "key twice": HEAD + text("a") + tensor() + text("a") + tensor() + TAIL,
        "value is a text": entry(text("hello")),
        "value is a dict": entry(b"}"),
        "value is missing": HEAD + text("a") + TAIL,
        "items of a list": b"\x80\x02](" + text("a") + tensor() + TAIL,
        "appends to a dict": b"\x80\x02}" + tensor() + b"a.",
        "a list": b"\x80\x02].",
        "a number": b"K\x01.",
        "none": b"N.",
        "nothing": b"",
        "only stop": b".",
        "only mark": b"(.",
        "pops nothing": b"0.",
        "no stop": HEAD + text("a"),
        "tuple of nothing": b"\x87.",
        "items without mark": b"}u.",
        "unknown opcode": b"\xff.",
        "protocol 255": b"\x80\xff",
        "truncated frame": b"\x95\xff",
        "long of 2^31 bytes": b"\x8b\xff\xff\xff\x7f",
        "text of 2^62": b"\x8d" + b"\xff" * 7 + b"?",
        "bytes of 2^62": b"\x8e" + b"\xff" * 7 + b"?",
        "array of 2^62": b"\x96" + b"\xff" * 7 + b"?",
        "text is not UTF-8": entry(b"X\x02\0\0\0\xff\xfe"),
        "20,000 digits": entry(b"L" + b"9" * 20_000 + b"L\n"),
        "a string opcode": entry(b"S'hello'\n"),
        "marks": b"(" * 1_900_000,
        "tuples": b")" * 1_900_000,
        "5 MB": HEAD + b")0" * 2_500_000,
    }


def _zips() -> dict[str, Bytes]:
    """Zip files, each of which is to be refused."""
    good = entry(tensor())
    plain = zipped(good)
    found = {
        "empty": b"",
        "no zip": b"hello",
        "end record only": plain[-22:],
        "pickle bomb": zipped(b"\0" * 100_000_000, compression=zipfile.ZIP_DEFLATED),
        "lzma": zipped(good, compression=zipfile.ZIP_LZMA),
        "bzip2": zipped(good, compression=zipfile.ZIP_BZIP2),
        "wrong checksum": plain.replace(b"embed.weight", b"embed.weighT"),
        "unknown compression": plain.replace(b"\0\0\0\0\0\0!\0", b"\0\0\0\0c\0!\0"),
    }
    directory = plain.index(b"PK\x01\x02")
    for name, offset, value in (
        ("encrypted", 8, b"\x01\0"),
        ("method 99", 10, b"\x63\0"),
        ("size of 4 GB", 24, b"\xfe\xff\xff\xff"),
        ("compressed size of 4 GB", 20, b"\xfe\xff\xff\xff"),
        ("offset of 4 GB", 42, b"\xfe\xff\xff\xff"),
        ("name of 65,535", 28, b"\xff\xff"),
        ("zip64 without extra", 24, b"\xff\xff\xff\xff"),
    ):
        at = directory + offset
        found[name] = plain[:at] + value + plain[at + len(value) :]
    return found | _archives(good)


def _archives(pickled: Bytes) -> dict[str, Bytes]:
    """Well-formed zip files with the wrong entries."""
    values = np.arange(4, dtype=np.float32).tobytes()
    variants: dict[str, list[tuple[str, Bytes]]] = {
        "no data.pkl": [("model/x", b"")],
        "two data.pkl": [("a/data.pkl", pickled), ("b/data.pkl", pickled)],
        "big endian": [("m/data.pkl", pickled), ("m/byteorder", b"big"), ("m/data/0", values)],
        "short storage": [("m/data.pkl", pickled), ("m/data/0", values[:8])],
        "odd storage": [("m/data.pkl", pickled), ("m/data/0", values[:13])],
        "empty storage": [("m/data.pkl", pickled), ("m/data/0", b"")],
    }
    found = {}
    for name, entries in variants.items():
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for entry_name, content in entries:
                archive.writestr(entry_name, content)
        found[name] = buffer.getvalue()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("m/data.pkl", pickled)
        archive.writestr("m/data/0", values)
    twice = buffer.getvalue().replace(b"m/data/0", b"m/dat.pkl"[:8])
    found["an entry of another name"] = twice
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", entry(tensor(data=storage(count=integer(10**8)))))
        archive.writestr("m/data/0", bytes(100_000_000))
    found["storage bomb"] = buffer.getvalue()
    return found


def torch_files(folder: Path, random_count: int, seed: int = 0) -> list[Hostile]:
    """Crafted files, and random mutations of a valid one."""
    canary = str(folder / "canary")
    found = [refused("torch", f"pickle: {k}", zipped(v)) for k, v in _pickles(canary).items()]
    found += [refused("torch", f"zip: {k}", v) for k, v in _zips().items()]
    path = folder / "valid.pt"
    write_torch_file(path, {"embed.weight": np.ones((4, 6), np.float32)})
    valid = path.read_bytes()
    path.unlink()
    found += mutations("torch", valid, random_count, seed)
    return found


def mutations(kind: str, valid: Bytes, count: int, seed: int) -> list[Hostile]:
    """Truncations, single flipped bits, overwritten and repeated ranges; some stay valid."""
    generator = random.Random(seed)

    def flip(content: bytearray) -> None:
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)

    def truncate(content: bytearray) -> None:
        del content[generator.randrange(len(content)) :]

    def overwrite(content: bytearray) -> None:
        at = generator.randrange(len(content))
        content[at : at + 8] = generator.randbytes(8)

    def maximize(content: bytearray) -> None:
        at = generator.randrange(len(content))
        content[at : at + 4] = b"\xff\xff\xff\x7f"

    changes: list[Callable[[bytearray], None]] = [flip, truncate, overwrite, maximize]
    found = []
    for i in range(count):
        content = bytearray(valid)
        changes[i % len(changes)](content)
        found.append(
            Hostile(kind, f"mutation {i}: {changes[i % len(changes)].__name__}", bytes(content))
        )
    return found
