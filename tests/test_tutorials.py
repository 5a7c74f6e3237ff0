"""The notebooks: valid, stored without outputs, and made of names that exist. ``tutorials/run.py`` executes them."""

import ast
import importlib
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "tutorials").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_clean_and_imports_what_exists(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    source = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None
            source.append(cell.source)
    for node in ast.walk(ast.parse("\n".join(source))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fp4dit_ao"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")


def test_there_is_a_notebook():
    assert NOTEBOOKS
