"""Prepares the English text of the studies: `python docs/results/english_data.py SOURCE OUT`.

SOURCE holds `books/*.txt.gz`, `books2/*.txt.gz`, `tinyshakespeare.txt`, `english_docs.txt.xz` and
`linux_doc_6.1.rst.txt.gz`; the last two have documents separated by NUL. OUT gets `train/*.txt` and
`heldout/*.txt`, uncompressed, documents separated by NUL. Held out: three books, and the documents
of `english_docs` whose SHA-256 is a multiple of 40.
"""

import argparse
import gzip
import hashlib
import lzma
from pathlib import Path

HELDOUT_BOOKS = ("don_quixote", "middlemarch", "emma")
HELDOUT_EVERY = 40


def is_heldout(document: bytes) -> bool:
    """Whether a document of `english_docs` is held out, by its hash."""
    return int.from_bytes(hashlib.sha256(document).digest()) % HELDOUT_EVERY == 0


def prepare(source: Path, out: Path) -> dict[str, int]:
    """Writes the files; returns the bytes of each, by its name relative to `out`."""
    written: dict[str, int] = {}

    def write(name: str, documents: list[bytes]) -> None:
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        written[name] = path.write_bytes(b"\0".join(documents))

    books = {
        path.name.removesuffix(".txt.gz"): gzip.decompress(path.read_bytes())
        for folder in ("books", "books2")
        for path in sorted((source / folder).glob("*.txt.gz"))
    }
    missing = [name for name in HELDOUT_BOOKS if name not in books]
    if missing:
        raise SystemExit(f"{source} lacks the books {', '.join(missing)}")
    for name in HELDOUT_BOOKS:
        write(f"heldout/{name}.txt", [books.pop(name)])
    books["tinyshakespeare"] = (source / "tinyshakespeare.txt").read_bytes()
    write("train/books.txt", list(books.values()))
    pages = lzma.decompress((source / "english_docs.txt.xz").read_bytes()).split(b"\0")
    write("heldout/english_docs.txt", [page for page in pages if is_heldout(page)])
    write("train/english_docs.txt", [page for page in pages if not is_heldout(page)])
    linux = gzip.decompress((source / "linux_doc_6.1.rst.txt.gz").read_bytes()).split(b"\0")
    write("train/linux_doc.txt", linux)
    return written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    for name, size in prepare(arguments.source, arguments.out).items():
        print(f"{size:>12,} {name}")
