"""Options of ``fp4dit-ao demo``."""

from pathlib import Path
from typing import Annotated

import typer

from fp4dit_ao.cli.options import Compile
from fp4dit_ao.cli.output_paths import check_writable_folder

Iterations = Annotated[
    int | None, typer.Option(min=1, help="Iterations of learned rounding per block, layer or window.")
]


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the picture, the table and the quantized pipeline.")] = Path(
        "outputs/demo"
    ),
    rounding: Annotated[
        str, typer.Option(help="'gptq', or learned, such as 'scale_aware', the paper's; see docs/methods.md.")
    ] = "gptq",
    iters: Annotated[
        int, typer.Option(min=1, help="Iterations of learned rounding per block (the paper: 2500).")
    ] = 100,
    seed: Annotated[int, typer.Option(help="Seed of calibration and images.")] = 0,
    compile: Compile = True,
) -> None:
    """Quantize the reference pipeline to W4A6, and compare it with the original and with naive INT4/INT6."""
    from fp4dit_ao.cli import demo as run

    check_writable_folder(out)
    run.demo(out, rounding, iters, seed, compile)
