"""The process that reads hostile files: one request per line, one verdict per line."""

import contextlib
import itertools
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from megalodon_jax.config import DataConfig, config_from_dict, load_config
from megalodon_jax.data import ByteTokenizer, load_tokenizer, make_loader
from megalodon_jax.errors import MegalodonError
from megalodon_jax.interop.convert import convert

# Address space above that at the start: a bomb that gets through ends in a MemoryError.
EXTRA_ADDRESSES = 4_000_000_000
TINY_MODEL = (
    "[model]\nnum_layers = 1\nmodel_dim = 8\nz_dim = 4\nvalue_dim = 8\nnum_heads = 1\n"
    "ffn_hidden_dim = 8\ncema_ndim = 2\nchunk_size = 16\nvocab_size = 257\nnorm_num_groups = 2\n"
)


def read_torch(path: Path, out: Path) -> None:
    config = out.with_suffix(".toml")
    config.write_text(TINY_MODEL)
    convert(path, out, str(config))


def read_released(path: Path, out: Path) -> None:
    convert(path, out)


def read_config(path: Path, _out: Path) -> None:
    load_config(path)


def read_tokenizer(path: Path, _out: Path) -> None:
    tokenizer = load_tokenizer(str(path))
    ids = tokenizer.encode("Hello, w\u00f6rld \U0001f600\n")
    tokenizer.encode_counted("Hello")
    tokenizer.decode(ids)


def read_text(path: Path, _out: Path) -> None:
    data = DataConfig(
        source="files", files=(str(path),), heldout_fraction=0.0, seq_len=64, batch_size=1
    )
    for _ in itertools.islice(make_loader(data, ByteTokenizer(), "train", repeat=False), 100):
        pass


READERS: dict[str, Callable[[Path, Path], None]] = {
    "torch": read_torch, "safetensors": read_released, "released": read_released,
    "huggingface": read_released,
    "config": read_config, "tokenizers": read_tokenizer, "sentencepiece": read_tokenizer,
    "text": read_text, "jsonl": read_text, "gzip": read_text, "parquet": read_text,
}  # fmt: skip


def status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def verdict(kind: str, path: Path, out: Path) -> tuple[str, str, int]:
    """(outcome, message, peak memory above that before)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak, where that is allowed
    before = status("VmHWM")
    try:
        READERS[kind](path, out)
        outcome, message = "accepted", ""
    except MegalodonError as error:
        outcome, message = "refused", str(error)
    # The command line prints the text of an OSError, which names the file.
    except OSError as error:
        outcome, message = "refused", str(error)
    # Not only Exception: panics of Rust libraries derive from BaseException.
    except BaseException as error:
        outcome, message = f"ends in {type(error).__name__}", str(error)[:500]
    extra = status("VmHWM") - before
    shutil.rmtree(out, ignore_errors=True)
    out.unlink(missing_ok=True)
    return outcome, message, extra


def main() -> None:
    config_from_dict({})
    limit = status("VmSize") + EXTRA_ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    # Output of libraries must not mix with the verdicts.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        kind, path, out = json.loads(line)
        with contextlib.redirect_stdout(sys.stderr):
            answer = verdict(kind, Path(path), Path(out))
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
