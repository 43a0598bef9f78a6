"""Kernels on any machine."""

from collections.abc import Iterator

import pytest

from pallas_kernels.common.target import find_target, interpreted


@pytest.fixture
def runnable(request: pytest.FixtureRequest) -> Iterator[None]:
    """Kernels run on a Hopper GPU (Triton's on any), elsewhere in their interpreter."""
    arguments = getattr(getattr(request.node, "callspec", None), "params", {})
    is_triton = arguments.get("implementation") == "triton"
    if is_triton:
        pytest.importorskip("triton", reason="needs the extra: pip install -e '.[triton]'")
    if find_target().is_hopper or (is_triton and find_target().platform == "gpu"):
        yield
        return
    with interpreted():
        yield
