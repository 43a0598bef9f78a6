"""Triton kernels stay within the Python that the oldest supported Triton (3.6) takes."""

import ast
from pathlib import Path

import pytest

SOURCES = [
    path
    for path in sorted(Path("pallas_kernels").glob("**/triton*/*.py"))
    if "import triton.language" in path.read_text()
]


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_assignments_unpack_no_nested_tuples(path):
    """Triton 3.6 fails on `a, (b, c) = f()` with "unhashable type: 'list'"."""
    nested = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Tuple) and any(isinstance(e, ast.Tuple) for e in target.elts)
    ]
    assert not nested


def test_there_are_sources():
    assert len(SOURCES) > 5
