"""ListOps: the value of nested operations on digits, generated."""

import re
from pathlib import Path

import numpy as np

from megalodon_jax.config import TrainConfig
from megalodon_jax.errors import DataError
from megalodon_jax.tasks.classification import (
    Classification,
    ExampleSets,
    ModelNeeds,
    cache_directory,
    heldout_part,
)


class ListOpsTask(Classification):
    """The value, 0 to 9, of a tree; see `data.example_sets.listops`."""

    def example_sets(self, config: TrainConfig) -> ExampleSets:
        """Generated trees, kept in `examples.cache`."""
        from megalodon_jax.data.example_sets.listops import open_listops

        settings = config.examples
        parts = open_listops(
            num_train=settings.num_train,
            num_heldout=settings.num_heldout,
            seed=settings.seed,
            cache=cache_directory(config),
        )
        return ExampleSets(parts["train"], {"": heldout_part(parts, config)})

    def needs(self, config: TrainConfig) -> ModelNeeds:
        """16 tokens, 10 classes."""
        from megalodon_jax.data.example_sets.listops import VOCAB_SIZE

        del config
        return ModelNeeds("tokens", VOCAB_SIZE, 10)

    def read_file(self, path: Path, config: TrainConfig) -> list[tuple[np.ndarray, ...]]:
        """Lines such as `[MAX 3 [SM 4 5] 1]`; parentheses are left out."""
        from megalodon_jax.data.example_sets import listops

        del config
        ids = {str(digit): listops.FIRST_DIGIT + digit for digit in range(10)}
        ids |= {f"[{name}": listops.FIRST_OPERATOR + i for i, name in enumerate(listops.OPERATORS)}
        ids["]"] = listops.END
        documents = []
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            words = re.sub(r"\[\s+", "[", line.replace("]", " ] ")).replace("(", " ")
            words = words.replace(")", " ").split()
            if unknown := [word for word in words if word not in ids]:
                raise DataError(f"{path}, line {number}: {unknown[0]!r} is no token of ListOps")
            tokens = [ids[word] for word in words] + [listops.EOS]
            documents.append((np.array(tokens, np.uint8),))
        return documents
