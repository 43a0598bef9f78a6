"""Data loading: document sources, tokenizers, packing, and a loader that resumes exactly.

Importing this package needs only numpy: grain and the libraries of file formats are imported on
first use.
"""

from megalodon_jax.data.loader import Loader, make_loader, merge_states, total_counts
from megalodon_jax.data.open_source import heldout_names, open_source
from megalodon_jax.data.packing import Counts
from megalodon_jax.data.sources import Document, Source
from megalodon_jax.data.splits import Split
from megalodon_jax.data.tokenizer import (
    ByteTokenizer,
    CountedTokens,
    Tokenizer,
    count_bytes,
    load_tokenizer,
)
from megalodon_jax.errors import DataError

__all__ = [
    "ByteTokenizer", "CountedTokens", "Counts", "DataError", "Document", "Loader",
    "Source", "Split", "Tokenizer", "count_bytes", "heldout_names", "load_tokenizer", "make_loader",
    "merge_states", "open_source", "total_counts",
]  # fmt: skip
