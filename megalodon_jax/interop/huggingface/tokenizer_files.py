"""Tokenizer files of a folder for `transformers`: the ids are those of this package.

`AutoTokenizer` puts the boundary token `bos` before a text, as `generate_text` does; special
tokens in a text are ordinary text, as in training (`split_special_tokens`).
"""

import json
from pathlib import Path
from typing import Any, Literal, cast

from megalodon_jax.data.tokenizer import (
    BYTE_VALUES,
    TOKENIZER_FILES,
    ByteTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from megalodon_jax.errors import ConvertError
from megalodon_jax.file_limits import MAX_TOKENIZER_BYTES, read_json_table

Kind = Literal["bytes", "tokenizers", "sentencepiece"]

CONFIG_FILE = "tokenizer_config.json"
KIND_KEY = "megalodon_tokenizer"
BYTES_BOUNDARY = "<|endoftext|>"
_TOKENIZER_JSON, _TOKENIZER_MODEL = TOKENIZER_FILES


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files with which `AutoTokenizer.from_pretrained` gives the tokenizer's ids, by name."""
    files = {name: text for name, text in tokenizer.files().items() if name != CONFIG_FILE}
    given = tokenizer.files().get(CONFIG_FILE)
    kind: Kind = "tokenizers"
    if isinstance(tokenizer, ByteTokenizer):
        kind = "bytes"
        files[_TOKENIZER_JSON] = byte_tokenizer_json().encode()
    elif isinstance(tokenizer, SentencePieceTokenizer):
        kind = "sentencepiece"
    table: dict[str, Any] = {} if given is None else json.loads(given)
    # The repository's own code would take the place of the class below.
    table.pop("auto_map", None)
    table |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _token(tokenizer, tokenizer.bos_id, files),
        "eos_token": _token(tokenizer, tokenizer.eos_id, files),
        # Rows of a batch end with their last token, as generation and the cache want it.
        "pad_token": _token(tokenizer, tokenizer.eos_id, files),
        "padding_side": "left",
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        KIND_KEY: kind,
    }
    if kind == "tokenizers":
        files[_TOKENIZER_JSON] = _with_bos(files[_TOKENIZER_JSON], table["bos_token"])
    if kind == "sentencepiece":
        table |= {"tokenizer_class": "MegalodonSentencePiece", "auto_map": _SENTENCEPIECE_CLASS}
    return {**files, CONFIG_FILE: (json.dumps(table, indent=2) + "\n").encode()}


# Lists name the Python and the Rust class.
_SENTENCEPIECE_CLASS = {"AutoTokenizer": ["tokenization_megalodon.MegalodonSentencePiece", None]}


def byte_tokenizer_json() -> str:
    """A `tokenizer.json` whose ids are UTF-8 bytes, and 256 the boundary token before a text.

    The library writes a byte as one printable character (Radford et al. 2019); a vocabulary of
    these characters without merges keeps bytes apart.
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as RustTokenizer

    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = RustTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    byte_level = cast(Any, pre_tokenizers.ByteLevel)
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken(BYTES_BOUNDARY, special=True, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{BYTES_BOUNDARY} $A", special_tokens=[(BYTES_BOUNDARY, BYTE_VALUES)]
    )
    return tokenizer.to_str(pretty=True)


def _with_bos(content: bytes, bos: str) -> bytes:
    """A `tokenizer.json` whose post-processor puts `bos` before a text, and nothing else.

    transformers takes it from this file alone. Encoding in this package does not use it.
    """
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers import processors

    tokenizer = RustTokenizer.from_buffer(content)
    template = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.post_processor = template  # type: ignore[assignment]
    wanted = json.loads(tokenizer.to_str())["post_processor"]
    table = json.loads(content)
    if table.get("post_processor") == wanted:
        return content
    return json.dumps({**table, "post_processor": wanted}, ensure_ascii=False).encode()


def _byte_characters() -> list[str]:
    """The character of every byte: itself if it prints, else one from U+0100 on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(BYTE_VALUES) if byte not in printable]
    return [
        chr(byte) if byte in printable else chr(0x100 + others.index(byte))
        for byte in range(BYTE_VALUES)
    ]


def _token(tokenizer: Tokenizer, token: int, files: dict[str, bytes]) -> str:
    if _TOKENIZER_JSON in files:
        from tokenizers import Tokenizer as RustTokenizer

        text = RustTokenizer.from_buffer(files[_TOKENIZER_JSON]).id_to_token(token)
    else:
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor(model_proto=files[_TOKENIZER_MODEL])
        text = processor.id_to_piece(token)
    assert text is not None
    return text


def read_tokenizer(folder: Path) -> str | None:
    """The tokenizer of a folder as `load_tokenizer` names it; None: the folder has none.

    Raises:
      ConvertError: `tokenizer_config.json` is not a table.
    """
    if not (folder / CONFIG_FILE).exists():
        table = {}
    else:
        table = read_json_table(
            folder / CONFIG_FILE, max_bytes=MAX_TOKENIZER_BYTES, error=ConvertError
        )
    if table.get(KIND_KEY) == "bytes":
        return "bytes"
    names = [name for name in TOKENIZER_FILES if (folder / name).exists()]
    if table.get(KIND_KEY) == "sentencepiece" and _TOKENIZER_MODEL in names:
        return str(folder / _TOKENIZER_MODEL)
    return str(folder / names[0]) if names else None


def load_folder_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder; None: the folder has none."""
    spec = read_tokenizer(folder)
    return None if spec is None else load_tokenizer(spec)
