"""Tokenizers: raw bytes, or a file of the `tokenizers` or `sentencepiece` library.

Training sees a document as bos + tokens + eos, the tokenizer's boundary tokens `bos_id` and
`eos_id`. Encoding never returns a boundary token: `"</s>"` in a document is ordinary text.
"""

import base64
import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Int, Int32, Int64

from megalodon_jax.data.pieces import TextCut, find_checked_cut
from megalodon_jax.errors import DataError
from megalodon_jax.file_limits import MAX_TOKENIZER_BYTES, FileLimitError, read_bytes
from megalodon_jax.storage.files import exists
from megalodon_jax.storage.location import AnyPath, as_path

BYTE_VALUES = 256
# The largest `model.vocab_size`.
MAX_VOCAB_SIZE = 100_000_000
# Names under which a run keeps a tokenizer's file.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
CONFIG_FILE = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
# The character that sentencepiece and related tokenizers write for a space.
WORD_START = "\u2581"


class CountedTokens(NamedTuple):
    """Tokens of a text, with the number of text bytes that each one encodes.

    Attributes:
      ids: token ids.
      num_bytes: UTF-8 bytes per token. Text that the tokenizer skips is counted with the next
        token; a character that several tokens share is counted with one of them.
      num_tail_bytes: bytes after the last token; all counts add up to `count_bytes(text)`.
    """

    ids: Int32[np.ndarray, " n"]
    num_bytes: Int32[np.ndarray, " n"]
    num_tail_bytes: int


class Tokenizer(Protocol):
    """The interface that the loader, evaluation and generation use."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def bos_id(self) -> int:
        """The boundary token before a document."""
        ...

    @property
    def eos_id(self) -> int:
        """The boundary token after a document."""
        ...

    def encode(self, text: str) -> Int32[np.ndarray, " n"]:
        """Ids of a text, without boundary tokens."""
        ...

    def encode_counted(self, text: str) -> CountedTokens:
        """The same ids, with the number of text bytes that each one encodes."""
        ...

    def find_cut(self, text: str) -> TextCut | None:
        """The last place in a text that goes on after its end at which it can be cut.

        Encoding both sides gives the ids of the whole, whatever follows. None: no such place is
        known.
        """
        ...

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " n"]) -> str:
        """Text of ids; boundary tokens are skipped, invalid UTF-8 becomes U+FFFD."""
        ...

    def fingerprint(self) -> str:
        """A text that changes if the meaning of the ids changes."""
        ...

    def files(self) -> dict[str, bytes]:
        """The contents of the files that define it, by name; none for `bytes`."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, and 256 as both boundary tokens."""

    vocab_size = BYTE_VALUES + 1
    bos_id = BYTE_VALUES
    eos_id = BYTE_VALUES

    def encode(self, text: str) -> Int32[np.ndarray, " n"]:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def encode_counted(self, text: str) -> CountedTokens:
        ids = self.encode(text)
        return CountedTokens(ids, np.ones_like(ids), 0)

    def find_cut(self, text: str) -> TextCut | None:
        return TextCut(len(text), len(text)) if text else None

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " n"]) -> str:
        checked = _checked_ids(ids, self.vocab_size)
        text = checked[checked < BYTE_VALUES]
        return text.astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def fingerprint(self) -> str:
        return "bytes"

    def files(self) -> dict[str, bytes]:
        return {}


class JsonTokenizer:
    """A `tokenizer.json` file of the `tokenizers` library.

    The boundary tokens come from a `tokenizer_config.json` in the same directory, else from
    well-known names such as `<s>` and `<|endoftext|>`. The file's truncation, padding and template
    are disabled.
    """

    # Names of boundary tokens in published tokenizers, in order of preference.
    _BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]", "[CLS]")
    _EOS_NAMES = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[EOS]", "[SEP]")

    def __init__(self, path: AnyPath):
        self._path = path
        self._json = _read_bytes(path)
        self._load()
        config_path = path.with_name(CONFIG_FILE)
        self._beside = _files_beside(path)
        self._config = self._beside.get(CONFIG_FILE)
        names = _boundary_tokens(self._config, config_path)
        bos = self._find_boundary_token(names.get("bos_token"), self._BOS_NAMES)
        eos = self._find_boundary_token(names.get("eos_token"), self._EOS_NAMES)
        self.bos_id, self.eos_id = _complete_boundary_tokens(bos, eos, path)

    def _load(self) -> None:
        from tokenizers import Tokenizer as RustTokenizer

        _check_charsmaps(self._json, self._path)
        with _naming_library_errors(f"{self._path} is not a tokenizer of `tokenizers`"):
            self._tokenizer = RustTokenizer.from_buffer(self._json)
            vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = max(vocabulary.values(), default=0) + 1
        _check_vocab_size(self.vocab_size, self._path)
        self._drops_space = _drops_space(self.encode)
        self._separators = _word_separators(vocabulary)

    def __getstate__(self) -> dict[str, Any]:
        # The library's pickling loses `encode_special_tokens`.
        return {key: value for key, value in self.__dict__.items() if key != "_tokenizer"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._load()

    def _find_boundary_token(self, configured: str | None, names: Sequence[str]) -> int | None:
        for name in names if configured is None else (configured,):
            if (token := self._tokenizer.token_to_id(name)) is not None:
                return token
        return None

    def encode(self, text: str) -> Int32[np.ndarray, " n"]:
        return np.asarray(self._encoding(text).ids, dtype=np.int32)

    def encode_counted(self, text: str) -> CountedTokens:
        encoding = self._encoding(text)
        char_ends = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)[:, 1]
        ids = np.asarray(encoding.ids, dtype=np.int32)
        return _count_by_ends(ids, _byte_offsets(text)[char_ends], count_bytes(text))

    def _encoding(self, text: str) -> Any:
        with _naming_library_errors(f"tokenizer {self._path} cannot encode a text"):
            return self._tokenizer.encode(text, add_special_tokens=False)

    def find_cut(self, text: str) -> TextCut | None:
        if self._drops_space is None:
            return None
        with _naming_library_errors(f"tokenizer {self._path} cannot encode a text"):
            return find_checked_cut(
                text, drops_space=self._drops_space, encode=self.encode, is_border=self._is_border
            )

    def _is_border(self, text: str, position: int) -> bool:
        normalizer, pre_tokenizer = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer
        before, whole = text[:position], text
        if normalizer is not None:
            before, whole = (normalizer.normalize_str(part) for part in (before, whole))
        if not whole.startswith(before):
            return False
        if pre_tokenizer is None:
            return whole[len(before)] in self._separators
        spans = (span for _, span in pre_tokenizer.pre_tokenize_str(whole))
        return not any(start < len(before) < stop for start, stop in spans)

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " n"]) -> str:
        text_ids = _without_boundary_tokens(_checked_ids(ids, self.vocab_size), self)
        return self._tokenizer.decode(text_ids.tolist(), skip_special_tokens=True)

    def fingerprint(self) -> str:
        return _file_fingerprint("tokenizers", self._json, self.bos_id, self.eos_id)

    def files(self) -> dict[str, bytes]:
        return {TOKENIZER_FILES[0]: self._json, **self._beside}


class SentencePieceTokenizer:
    """A `.model` file of the `sentencepiece` library, with the boundary tokens that it defines."""

    def __init__(self, path: AnyPath):
        from sentencepiece import SentencePieceProcessor

        self._proto = _read_bytes(path)
        self._beside = _files_beside(path)
        try:
            self._processor = SentencePieceProcessor(model_proto=self._proto)
            self.vocab_size = int(self._processor.vocab_size())
        # The exception type for a malformed model differs between releases.
        except Exception as error:
            raise DataError(f"{path} is not a model of `sentencepiece`: {error!s:.400}") from error
        _check_vocab_size(self.vocab_size, path)
        # -1: not defined.
        ids = (int(self._processor.bos_id()), int(self._processor.eos_id()))
        bos, eos = (token if token >= 0 else None for token in ids)
        self.bos_id, self.eos_id = _complete_boundary_tokens(bos, eos, path)
        self._drops_space = _drops_space(self.encode)
        self._separators = _word_separators(
            self._processor.id_to_piece(i) for i in range(self.vocab_size)
        )

    def encode(self, text: str) -> Int32[np.ndarray, " n"]:
        return np.asarray(self._processor.encode(text), dtype=np.int32)

    def encode_counted(self, text: str) -> CountedTokens:
        from sentencepiece import sentencepiece_pb2

        # Only the serialized form has byte offsets in all releases since 0.2.
        encoded = self._processor.encode(text, out_type="serialized_proto")
        pieces = sentencepiece_pb2.SentencePieceText.FromString(encoded).pieces  # type: ignore[attr-defined]
        ids = np.asarray([piece.id for piece in pieces], dtype=np.int32)
        ends = np.asarray([piece.end for piece in pieces], dtype=np.int64)
        return _count_by_ends(ids, ends, count_bytes(text))

    def find_cut(self, text: str) -> TextCut | None:
        if self._drops_space is None:
            return None
        return find_checked_cut(
            text, drops_space=self._drops_space, encode=self.encode, is_border=self._is_border
        )

    def _is_border(self, text: str, position: int) -> bool:
        # A line break becomes a space in the library's default normalization.
        normalized = self._processor.normalize(f"x{text[position]}x")
        before, separator, after = normalized.lstrip(WORD_START).partition(text[position])
        if not separator:
            before, separator, after = normalized.lstrip(WORD_START).partition(WORD_START)
        return (before, after) == ("x", "x") and separator in self._separators

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " n"]) -> str:
        return self._processor.decode(
            _without_boundary_tokens(_checked_ids(ids, self.vocab_size), self).tolist()
        )

    def fingerprint(self) -> str:
        return _file_fingerprint("sentencepiece", self._proto, self.bos_id, self.eos_id)

    def files(self) -> dict[str, bytes]:
        return {TOKENIZER_FILES[1]: self._proto, **self._beside}


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that `DataConfig.tokenizer` names.

    Args:
      spec: `"bytes"`, or the path or URL of a `.json` (`tokenizers`) or `.model` (`sentencepiece`)
        file.

    Raises:
      ConfigError: the URL's scheme is unknown, or its package is not installed.
      DataError: the file is missing, of another kind, or defines no boundary token.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = as_path(spec).expanduser()
    kinds = {".json": JsonTokenizer, ".model": SentencePieceTokenizer}
    if path.suffix not in kinds:
        raise DataError(
            f"tokenizer is {spec!r}; use 'bytes' or the path of a tokenizer.json or .model file"
        )
    return kinds[path.suffix](path)


def count_bytes(text: str) -> int:
    """UTF-8 bytes of a text."""
    return len(text.encode("utf-8"))


def _drops_space(encode: Callable[[str], Int32[np.ndarray, " n"]]) -> bool | None:
    """Whether a tokenizer puts a space before every text; None: texts cannot be joined at all."""
    whole = encode("ab cd").tolist()
    if whole == encode("ab").tolist() + encode(" cd").tolist():
        return False
    return True if whole == encode("ab").tolist() + encode("cd").tolist() else None


def _word_separators(pieces: Iterable[str]) -> frozenset[str]:
    """Characters that no token has after another character: tokens never cross into them."""
    inside: set[str] = set()
    for piece in pieces:
        inside |= {c for c in (WORD_START, " ", "\n") if c in piece.lstrip(c)}
    return frozenset((WORD_START, " ", "\n")) - inside


def _read_bytes(path: AnyPath) -> bytes:
    try:
        content = read_bytes(path, max_bytes=MAX_TOKENIZER_BYTES)
    except FileLimitError as error:
        raise DataError(f"cannot read tokenizer {path}: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read tokenizer {path}: {error.strerror or error}") from error
    if not content:
        raise DataError(f"tokenizer {path} is empty")
    return content


def _files_beside(path: AnyPath) -> dict[str, bytes]:
    """The configuration and the chat template in a tokenizer's directory."""
    known = {name: path.with_name(name) for name in (CONFIG_FILE, CHAT_TEMPLATE_FILE)}
    return {name: _read_bytes(each) for name, each in known.items() if exists(each)}


@contextlib.contextmanager
def _naming_library_errors(what: str) -> Iterator[None]:
    """Raises `DataError` for an error of the `tokenizers` library.

    The library raises several types for malformed files, and PanicException, which derives from
    BaseException only, where its own checks fail.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{what}: {' '.join(str(error).split()):.400}") from error


def _check_charsmaps(content: bytes, path: AnyPath) -> None:
    """Checks the sizes in normalization tables: the library allocates what a table declares."""
    if b"precompiled_charsmap" not in content:
        return
    try:
        tables = _values_of_key(json.loads(content), "precompiled_charsmap")
        decoded = [base64.b64decode(table, validate=True) for table in tables if table]
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is not a tokenizer of `tokenizers`: {error}") from error
    for table in decoded:
        size = int.from_bytes(table[:4], "little")
        if len(table) < 4 or size % 4 or size > len(table) - 4:
            raise DataError(
                f"{path} has a precompiled_charsmap of {len(table):,} bytes that declares {size:,}"
            )


def _values_of_key(tree: Any, key: str) -> list[Any]:
    """All values of a key in nested JSON."""
    if isinstance(tree, list):
        return [value for entry in tree for value in _values_of_key(entry, key)]
    if not isinstance(tree, dict):
        return []
    below = [value for entry in tree.values() for value in _values_of_key(entry, key)]
    return ([tree[key]] if key in tree else []) + below


def _check_vocab_size(vocab_size: int, path: AnyPath) -> None:
    if not 0 < vocab_size <= MAX_VOCAB_SIZE:
        raise DataError(
            f"tokenizer {path} has token ids up to {vocab_size - 1:,}; at most "
            f"{MAX_VOCAB_SIZE - 1:,} are supported"
        )


def _boundary_tokens(content: bytes | None, path: AnyPath) -> dict[str, str]:
    """The boundary tokens in a `tokenizer_config.json`; none without the file."""
    if content is None:
        return {}
    try:
        table = json.loads(content.decode("utf-8"))
        tokens = {key: table.get(key) for key in ("bos_token", "eos_token")}
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"cannot read the boundary tokens in {path}: {error}") from error
    # An added token is stored as an object, an ordinary one as its text.
    texts = {
        key: token.get("content") if isinstance(token, dict) else token
        for key, token in tokens.items()
    }
    for key, text in texts.items():
        if not isinstance(text, str | None):
            raise DataError(f"{key} in {path} is {text!r:.80}; it must be a text")
    return {key: text for key, text in texts.items() if text is not None}


def _complete_boundary_tokens(bos: int | None, eos: int | None, path: AnyPath) -> tuple[int, int]:
    defined = [token for token in (bos, eos) if token is not None]
    if not defined:
        raise DataError(
            f"{path} defines no boundary token (bos or eos) to separate documents; add one (for "
            "tokenizer.json: bos_token or eos_token in a tokenizer_config.json beside it)"
        )
    return defined[0], defined[-1]


def _checked_ids(
    ids: Sequence[int] | Int[np.ndarray, " n"], vocab_size: int
) -> Int64[np.ndarray, " n"]:
    array = np.asarray(ids, dtype=np.int64).reshape(-1)
    if array.size and (array.min() < 0 or array.max() >= vocab_size):
        wrong = array[(array < 0) | (array >= vocab_size)][0]
        raise DataError(f"token id {wrong} is outside the vocabulary; use 0 to {vocab_size - 1}")
    return array


def _without_boundary_tokens(
    ids: Int64[np.ndarray, " n"], tokenizer: Tokenizer
) -> Int64[np.ndarray, " m"]:
    return ids[(ids != tokenizer.bos_id) & (ids != tokenizer.eos_id)]


def _byte_offsets(text: str) -> Int64[np.ndarray, " n"]:
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(widths)])


def _count_by_ends(
    ids: Int32[np.ndarray, " n"], ends: Int64[np.ndarray, " n"], num_text_bytes: int
) -> CountedTokens:
    reached = np.maximum.accumulate(np.concatenate([np.zeros(1, np.int64), ends]))
    return CountedTokens(ids, np.diff(reached).astype(np.int32), num_text_bytes - int(reached[-1]))


def _file_fingerprint(kind: str, content: bytes, bos_id: int, eos_id: int) -> str:
    return f"{kind}:{hashlib.sha256(content).hexdigest()[:16]}:{bos_id}:{eos_id}"
