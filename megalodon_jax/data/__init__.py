"""From text to batches: sources of documents, tokenizers, and a loader that can be resumed exactly.

Importing this package needs only numpy; the libraries for loading and for file formats are imported
when they are used.
"""

from megalodon_jax.data.loader import Loader, make_loader, merge_states
from megalodon_jax.data.packing import CountedBatch
from megalodon_jax.data.sources import Document, Source, Split, open_source
from megalodon_jax.data.tokenizer import (
    ByteTokenizer,
    CountedTokens,
    Tokenizer,
    count_bytes,
    load_tokenizer,
)
from megalodon_jax.errors import DataError

__all__ = [
    "ByteTokenizer", "CountedBatch", "CountedTokens", "DataError", "Document", "Loader", "Source",
    "Split", "Tokenizer", "count_bytes", "load_tokenizer", "make_loader", "merge_states",
    "open_source",
]  # fmt: skip
