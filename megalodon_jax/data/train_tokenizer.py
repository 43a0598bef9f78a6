"""Training of a tokenizer on files of text."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from megalodon_jax.config import DataConfig
from megalodon_jax.data.open_source import open_source
from megalodon_jax.data.pieces import PIECE_BYTES, read_piece
from megalodon_jax.data.sources import Source
from megalodon_jax.data.text_files import naming
from megalodon_jax.data.tokenizer import BYTE_VALUES, ByteTokenizer
from megalodon_jax.errors import ConfigError, DataError

TokenizerLibrary = Literal["tokenizers", "sentencepiece"]
BOS, EOS = "<s>", "</s>"
# Words of GPT-4 and Llama 3: letters with one character before them, up to three digits,
# punctuation with the space before and line breaks after it, white space.
WORD_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(
    files: Sequence[str],
    output: str | Path,
    *,
    vocab_size: int,
    library: TokenizerLibrary = "tokenizers",
    text_field: str = "text",
    document_separator: str = "",
    max_bytes: int = 1 << 30,
) -> int:
    """Trains a byte-pair encoding and writes a file that `DataConfig.tokenizer` reads.

    Every text can be encoded: unknown characters are encoded as bytes. With `tokenizers` (BPE over
    bytes) decoding gives back the text exactly; with `sentencepiece` too, because its text is not
    normalized.

    Args:
      files: paths, folders or globs, see `DataConfig.files`.
      output: a new file that ends in .json (`tokenizers`) or .model (`sentencepiece`).
      vocab_size: number of ids, the boundary tokens `<s>` and `</s>` included.
      library: which library trains it.
      text_field: see `DataConfig.text_field`.
      document_separator: see `DataConfig.document_separator`.
      max_bytes: text is read up to this many bytes, about the same share of every document.

    Returns:
      The number of ids, which is smaller than `vocab_size` if the text is short.

    Raises:
      ConfigError: the output exists or has another suffix, or `vocab_size` is too small.
      DataError: a file cannot be read, or the text is too short.
    """
    path = Path(output).expanduser()
    suffix = {"tokenizers": ".json", "sentencepiece": ".model"}[library]
    if path.suffix != suffix:
        raise ConfigError(f"output is {str(output)!r}; a file of `{library}` ends in {suffix}")
    if path.exists():
        raise ConfigError(f"{path} exists and is not overwritten; choose another output")
    # Bytes, boundary tokens, and one for unknown text in sentencepiece.
    smallest = BYTE_VALUES + 3
    if vocab_size <= smallest:
        raise ConfigError(f"vocab_size is {vocab_size}; must be more than {smallest}")
    config = DataConfig(
        source="files",
        files=tuple(files),
        heldout_fraction=0.0,
        text_field=text_field,
        document_separator=document_separator,
    )
    texts = _texts(open_source(config, "train"), max_bytes)
    path.parent.mkdir(parents=True, exist_ok=True)
    if library == "sentencepiece":
        return _train_sentencepiece(texts, path, vocab_size)
    return _train_bpe(texts, path, vocab_size)


def _texts(source: Source, max_bytes: int) -> Iterator[str]:
    """The documents in pieces: a share of each one if there is more text than `max_bytes`."""
    total = sum(source.open(index).num_bytes() for index in range(len(source)))
    share = min(1.0, max_bytes / max(total, 1))
    for index in range(len(source)):
        with naming(lambda index=index: source.where(index)):
            content = source.open(index)
            stop = content.num_bytes() * share
            start, is_last = 0, False
            while start < stop and not is_last:
                piece = read_piece(content, start, ByteTokenizer(), size=PIECE_BYTES)
                start, is_last = piece.stop, piece.is_last
                yield piece.text


def _train_bpe(texts: Iterator[str], path: Path, vocab_size: int) -> int:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))
    return tokenizer.get_vocab_size()


def _train_sentencepiece(texts: Iterator[str], path: Path, vocab_size: int) -> int:
    import sentencepiece

    settings: dict[str, Any] = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    try:
        with path.open("xb") as file:
            sentencepiece.SentencePieceTrainer.train(  # type: ignore[attr-defined]
                sentence_iterator=_lines(texts),
                model_writer=file,
                vocab_size=vocab_size,
                **settings,
            )
    except (RuntimeError, OSError) as error:
        path.unlink(missing_ok=True)
        reason = str(error).strip().rpartition("\n")[2]
        raise DataError(f"sentencepiece cannot train on this text: {reason}") from error
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return int(model.vocab_size())


def _lines(texts: Iterator[str]) -> Iterator[str]:
    """Lines that the trainer takes: not empty, and not longer than it reads."""
    longest = 4000
    for text in texts:
        for line in text.splitlines():
            yield from (
                part
                for i in range(0, len(line), longest // 4)
                if (part := line[i : i + longest // 4]).strip() and "\0" not in part
            )
