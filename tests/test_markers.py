"""The tables by which tests are marked name tests that exist."""

import ast
from types import SimpleNamespace
from typing import Any

import pytest

from tests import conftest
from tests.conftest import ROOT

TABLES = (conftest.SLOW, conftest.DOCS, conftest.GPU, conftest.LONGEST)


@pytest.mark.parametrize("entry", dict.fromkeys(entry for table in TABLES for entry in table))
def test_entry_names_something(entry: str) -> None:
    path, _, function = entry.partition("::")
    assert (ROOT / path).exists()
    if function:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_longest_files_come_first() -> None:
    def item(nodeid: str) -> Any:
        return SimpleNamespace(nodeid=nodeid, name="test", add_marker=lambda mark: None)

    names = ["tests/a.py::test", f"{conftest.LONGEST[1]}::test", "tests/b.py::test", f"{conftest.LONGEST[0]}::test"]
    items = list(map(item, names))
    conftest.pytest_collection_modifyitems(items)
    assert [each.nodeid for each in items] == [names[3], names[1], names[0], names[2]]


def test_this_test_is_fast(request: pytest.FixtureRequest) -> None:
    marks = {mark.name for mark in request.node.iter_markers()}
    assert "fast" in marks and not marks & {"slow", "docs", "gpu"}
