"""``python -m benchmarks.gpu``."""

import typer

from benchmarks.gpu import main

if __name__ == "__main__":
    typer.run(main)
