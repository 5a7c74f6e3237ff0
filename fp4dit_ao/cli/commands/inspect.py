"""Options of ``fp4dit-ao inspect``."""

from pathlib import Path
from typing import Annotated

import typer

from fp4dit_ao.cli.options import Device
from fp4dit_ao.cli.output_paths import check_writable_file


def inspect(
    model: Annotated[str, typer.Argument(help="A quantized pipeline's folder.")],
    against: Annotated[
        str | None, typer.Option(help="MODEL that it was made from: adds the error of each weight.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="PNG of the levels that the weights use.")] = None,
    device: Device = None,
    measure: Annotated[
        bool, typer.Option(help="Measure every layer against bfloat16 on this machine: some seconds, once.")
    ] = True,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Image tokens of a call, all images together; those of calibration if not given."),
    ] = None,
    measure_again: Annotated[
        bool, typer.Option("--measure-again", help="Measure anew what an earlier run has measured and kept.")
    ] = False,
) -> None:
    """Print format, unit, bytes, speed on this machine and error of each layer of MODEL; what stayed in high precision; why."""
    if picture is not None:
        check_writable_file(picture)
    from fp4dit_ao.cli import inspect as run

    run.inspect(model, against, picture, device, run.Measuring(tokens, measure_again) if measure else None)
