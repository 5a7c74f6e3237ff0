"""Options of ``fp4dit-ao export``."""

from pathlib import Path
from typing import Annotated

import typer

from fp4dit_ao.cli.options import Device
from fp4dit_ao.cli.output_paths import check_writable_file


def export(
    model: Annotated[str, typer.Argument(help="A quantized pipeline's folder, or its transformer's.")],
    out: Annotated[
        Path, typer.Argument(help="File to write: .pt2 runs, .safetensors holds codes and scales for other tools.")
    ],
    aoti: Annotated[bool, typer.Option("--aoti", help="Compile it ahead of time (AOTInductor).")] = False,
    device: Device = None,
) -> None:
    """Write MODEL's transformer as one file: a torch.export archive, compiled code, or codes and scales alone."""
    from fp4dit_ao.cli import export as run

    check_writable_file(out)
    run.export(model, out, aoti, device)
