"""`python -m megalodon_jax` is the `megalodon` command."""

import sys

from megalodon_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
