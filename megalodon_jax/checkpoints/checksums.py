"""Checksums of files as texts: SHA-256 as hexadecimal digits, others with their kind before ":".

`md5:` and `crc32c:` are followed by base64, as Google Cloud Storage writes them; `etag:` by the
ETag of an S3 object, which is a function of its content and of how it was uploaded.
"""

import base64
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

_KINDS = ("sha256", "md5", "crc32c")


def kind_of(checksum: str) -> str:
    """The kind of a checksum."""
    kind, separator, _ = checksum.partition(":")
    return kind if separator else "sha256"


def content_checksum(chunks: Callable[[], Iterable[Any]], listed: Sequence[str]) -> bool:
    """Whether a content has the first listed checksum that can be computed from content alone.

    Args:
      chunks: gives the content in pieces.
      listed: checksums of the content as it was written.
    """
    by_kind = {kind_of(checksum): checksum for checksum in listed}
    for kind in _KINDS:
        if kind in by_kind:
            return compute(chunks(), kind) == by_kind[kind]
    return False


def compute(chunks: Iterable[Any], kind: str) -> str:
    """One checksum of a content."""
    if kind == "crc32c":
        # Comes with gcsfs; a copy of a run on gs:// has MD5 sums too, except of composed objects.
        import google_crc32c

        digest: Any = google_crc32c.Checksum()
    else:
        digest = hashlib.new(kind)
    for chunk in chunks:
        digest.update(bytes(chunk) if kind == "crc32c" else chunk)
    if kind == "sha256":
        return digest.hexdigest()
    return f"{kind}:{base64.b64encode(digest.digest()).decode()}"
