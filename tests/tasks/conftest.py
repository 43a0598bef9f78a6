"""Every module here compiles its tiny runs once."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def _tiny_runs(shared_compilation, short_prefetch):
    pass
