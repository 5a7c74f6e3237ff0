"""Options of ``fp4dit-ao generate``."""

from pathlib import Path
from typing import Annotated

import typer

from fp4dit_ao.cli.call_options import call_options
from fp4dit_ao.cli.options import Call, Compile, Device, Dtype, Steps, Weights
from fp4dit_ao.cli.output_paths import check_writable_file


def generate(
    model: Annotated[str, typer.Argument(help="A quantized pipeline's folder, or any MODEL.")],
    prompt: Annotated[list[str], typer.Option(help="Prompt to draw; repeatable.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("generated.png"),
    compare: Annotated[str | None, typer.Option(help="MODEL that draws the same, in another column.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise; the same for both models.")] = 0,
    steps: Steps = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images generated together.")] = 4,
    compile: Compile = False,
    device: Device = None,
    weights: Weights = "packed",
    call: Call = None,
    dtype: Dtype = "stored",
) -> None:
    """Draw prompts into one picture, with --compare beside another model's images of the same seeds."""
    check_writable_file(out)
    arguments = call_options(call, steps)
    from fp4dit_ao.cli import generate as run

    run.generate(model, prompt, out, compare, seed, arguments, batch_size, compile, device, weights, dtype)
