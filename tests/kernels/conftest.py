"""Kernels on any machine."""

from collections.abc import Iterator

import pytest

from pallas_kernels.common.target import find_target, interpreted


@pytest.fixture
def runnable() -> Iterator[None]:
    """Kernels run on a Hopper GPU, elsewhere in their interpreter."""
    if find_target().is_hopper:
        yield
        return
    with interpreted():
        yield
