"""Golden vectors, computed by the authors' released CUDA code (tests/golden/README.md)."""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megalodon_jax.interop.released import config_from_released, from_state_dict
from megalodon_jax.model import Megalodon

GOLDEN = Path(__file__).resolve().parent / "golden"


class GoldenModel(NamedTuple):
    meta: dict[str, Any]
    state_dict: dict[str, np.ndarray]
    arrays: dict[str, np.ndarray]

    def build(self, **overrides: Any) -> Megalodon:
        return from_state_dict(
            config_from_released(self.meta["config"], **overrides), self.state_dict
        )


@functools.cache
def read_golden(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(meta, arrays) of one golden file."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    return json.loads(str(arrays.pop("__meta__"))), arrays


def golden_model(name: str) -> GoldenModel:
    """One golden model with its parameters by released name."""
    meta, arrays = read_golden(name)
    state_dict = {
        key.removeprefix("param:"): value
        for key, value in arrays.items()
        if key.startswith("param:")
    }
    return GoldenModel(meta, state_dict, arrays)


def relative_error(actual: Any, expected: Any) -> float:
    """Relative L2 error in float64 (complex128 for complex arrays)."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{actual.shape} != {expected.shape}"
    wide = np.complex128 if np.iscomplexobj(expected) else np.float64
    actual, expected = actual.astype(wide), expected.astype(wide)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
