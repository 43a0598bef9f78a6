"""The Hugging Face form of a model: a folder that `transformers` loads."""

from megalodon_jax.interop.huggingface.folder import (
    MAX_SHARD_BYTES,
    FolderContents,
    is_huggingface_folder,
    read_huggingface,
    write_huggingface,
)
from megalodon_jax.interop.huggingface.push import push_to_hub

__all__ = [
    "MAX_SHARD_BYTES",
    "FolderContents",
    "is_huggingface_folder",
    "push_to_hub",
    "read_huggingface",
    "write_huggingface",
]
