"""The tables by which tests are marked name tests that exist."""

import ast

import pytest

from tests import conftest
from tests.conftest import ROOT


@pytest.mark.parametrize("entry", [*conftest.SLOW, *conftest.DOCS, *conftest.GPU])
def test_entry_names_something(entry: str) -> None:
    path, _, function = entry.partition("::")
    assert (ROOT / path).exists()
    if function:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_this_test_is_fast(request: pytest.FixtureRequest) -> None:
    marks = {mark.name for mark in request.node.iter_markers()}
    assert "fast" in marks and not marks & {"slow", "docs", "gpu"}
