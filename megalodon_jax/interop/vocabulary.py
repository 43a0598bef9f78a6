"""Vocabulary growth: special tokens added to a tokenizer, and their rows in a model."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from megalodon_jax.data.tokenizer import (
    CONFIG_FILE,
    TOKENIZER_FILES,
    ByteTokenizer,
    JsonTokenizer,
    Tokenizer,
    load_tokenizer,
)
from megalodon_jax.errors import ConvertError
from megalodon_jax.interop.huggingface.tokenizer_files import BYTES_BOUNDARY, byte_tokenizer_json
from megalodon_jax.language_model import LanguageModel
from megalodon_jax.models import abstract_model
from megalodon_jax.parameter_names import name_of

# The axis of the vocabulary in the parameters that have one.
_VOCABULARY_AXES = {"embed.embedding": 0, "output.kernel": 1}


def add_special_tokens(tokenizer: Tokenizer, tokens: Sequence[str]) -> Tokenizer:
    """A tokenizer with special tokens after its last id; all old ids stay.

    Special tokens come from a chat template only; in a text they are ordinary text. The byte
    tokenizer becomes a `tokenizer.json` with the same ids.

    Args:
      tokenizer: bytes, or of a `tokenizer.json`.
      tokens: their texts.

    Raises:
      ConvertError: a token is empty, given twice or known already, or the tokenizer is of
        sentencepiece.
    """
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as RustTokenizer

    files = dict(tokenizer.files())
    if isinstance(tokenizer, ByteTokenizer):
        files[TOKENIZER_FILES[0]] = byte_tokenizer_json().encode()
        boundary = {"bos_token": BYTES_BOUNDARY, "eos_token": BYTES_BOUNDARY}
        files[CONFIG_FILE] = json.dumps(boundary).encode()
    elif not isinstance(tokenizer, JsonTokenizer):
        raise ConvertError(
            "special tokens are added to a tokenizer.json or to bytes; a sentencepiece .model has "
            "its control tokens from training on"
        )
    grown = RustTokenizer.from_buffer(files[TOKENIZER_FILES[0]])
    for number, token in enumerate(tokens):
        if not token or token in tokens[:number] or grown.token_to_id(token) is not None:
            problem = "empty" if not token else "given twice, or an entry of the vocabulary already"
            raise ConvertError(f"the special token {token!r:.80} is {problem}")
    added = [AddedToken(token, special=True, normalized=False) for token in tokens]
    # Ids after the last one: the library takes the number of entries, which may have gaps.
    if grown.get_vocab_size(with_added_tokens=True) != tokenizer.vocab_size:
        raise ConvertError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1} and "
            f"{grown.get_vocab_size(with_added_tokens=True)} entries; new ids would be old ones"
        )
    grown.add_special_tokens(added)
    files[TOKENIZER_FILES[0]] = grown.to_str(pretty=True).encode()
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        return load_tokenizer(str(Path(folder) / TOKENIZER_FILES[0]))


def grow_vocabulary(
    model: LanguageModel, vocab_size: int, *, num_trained: int | None = None
) -> LanguageModel:
    """A model with more token ids; scores of the old ones stay.

    New rows of the embedding and columns of the output matrix are the mean of the trained ones
    (Hewitt 2021): a new token has about the score of an average one. All new tokens are equal until
    they are trained.

    Args:
      model: tied or untied.
      vocab_size: number of ids that the tokenizer has now.
      num_trained: ids below it have been trained, all others become the mean; None: all of the
        model's.

    Raises:
      ConvertError: the model has other numbers of ids for inputs and outputs, of which some would
        have no row.
    """
    old = model.config
    trained = old.vocab_size if num_trained is None else num_trained
    if trained > min(old.vocab_size, old.num_outputs) or vocab_size < trained:
        raise ConvertError(
            f"the model knows {old.vocab_size} ids and scores {old.num_outputs}, {trained} of them "
            f"trained; it cannot grow to {vocab_size}"
        )
    config = replace(
        old,
        vocab_size=max(old.vocab_size, vocab_size),
        output_size=None if old.output_size is None else max(old.output_size, vocab_size),
    )
    graphdef, abstract = abstract_model(config)
    params = nnx.state(model, nnx.Param)

    def grow(path: tuple[Any, ...], leaf: Any, wanted: jax.ShapeDtypeStruct) -> Any:
        axis = _VOCABULARY_AXES.get(name_of(path))
        if axis is None:
            return leaf
        rows = np.moveaxis(np.asarray(leaf), axis, 0)[:trained]
        mean = rows.astype(np.float64).mean(axis=0).astype(rows.dtype)
        count = wanted.shape[axis] - trained
        grown = np.concatenate([rows, np.broadcast_to(mean, (count, *mean.shape))])
        return np.ascontiguousarray(np.moveaxis(grown, 0, axis))

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(grow, params, abstract))
