"""Trains a model: `python train.py CONFIG.toml ...` is `megalodon train CONFIG.toml ...`."""

import sys

from megalodon_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
