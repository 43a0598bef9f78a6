"""Every shipped training configuration runs as shipped, or its first line names what it needs."""

import dataclasses
import math

import pytest

from megalodon_jax.config import load_config
from megalodon_jax.presets import configs_dir

FILES = sorted([*configs_dir().glob("*.toml"), *configs_dir().glob("pods/*.toml")])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_first_line_names_what_is_needed(file):
    config = load_config(file)
    data = config.data
    needed = [*data.files, *data.heldout_files]
    if data.tokenizer != "bytes":
        needed.append(data.tokenizer)
    first_line = file.read_text().splitlines()[0]
    assert first_line.startswith("# Needs ") == bool(needed)
    devices = math.prod(dataclasses.astuple(config.mesh))
    assert devices < 2 or f"{devices} chips" in first_line
    for path in needed:
        assert path in first_line
        # A path outside the working directory exists on one machine only.
        assert not path.startswith(("/", ".."))
