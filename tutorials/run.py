"""Execute notebooks from top to bottom: ``python tutorials/run.py [NOTEBOOK …]``, all of this folder by default.

The notebooks in the repository have no outputs; ``--out FOLDER`` keeps executed copies. A failing cell ends with its
traceback and a non-zero exit status.
"""

import argparse
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).parent


def execute(path: Path, out: Path | None, timeout: int) -> None:
    """Run one notebook in its own folder.

    Raises:
        CellExecutionError: a cell raised.
    """
    notebook = nbformat.read(path, as_version=4)
    start = time.perf_counter()
    NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    ).execute()
    cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    print(f"{path.name}: {cells} cells in {time.perf_counter() - start:.0f} s", flush=True)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, out / path.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(HERE.glob("*.ipynb")))
    parser.add_argument("--out", type=Path, help="folder for executed copies")
    parser.add_argument("--timeout", type=int, default=600, help="seconds for one cell")
    arguments = parser.parse_args()
    for path in arguments.notebooks:
        try:
            execute(path, arguments.out, arguments.timeout)
        except CellExecutionError as error:
            sys.exit(f"{path.name}: {error}")


if __name__ == "__main__":
    main()
