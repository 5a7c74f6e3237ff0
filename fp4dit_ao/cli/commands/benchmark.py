"""Options of ``fp4dit-ao benchmark``."""

from pathlib import Path
from typing import Annotated

import typer

from fp4dit_ao.cli.options import Device, Prompts, Steps
from fp4dit_ao.cli.output_paths import check_writable_file


def benchmark(
    model: Annotated[str, typer.Argument(help="A float pipeline to generate with: folder, hub id, or 'reference'.")] = (
        "reference"
    ),
    part: Annotated[
        list[str] | None,
        typer.Option(help="'linears', 'attention', 'transformer' or 'generation'; repeatable. All if not given."),
    ] = None,
    recipe: Annotated[
        list[str],
        typer.Option(help="Recipes to measure, with nearest rounding; repeatable. Bars are judged on the first."),
    ] = ["w4a6_codebook", "w4a6", "w4a8", "w4a8_int8"],  # noqa: B006
    peer: Annotated[
        list[str] | None,
        typer.Option(help="Packages to compare with, such as 'SDNQ int8', or 'none'; repeatable. All if not given."),
    ] = None,
    linear: Annotated[
        list[str] | None,
        typer.Option(help="Weights and tokens, such as flux:256,1024 or 4608x1152:16+peers (out x in); repeatable."),
    ] = None,
    transformer: Annotated[
        list[str] | None,
        typer.Option(help="Pixels and layers of PixArt-XL's width, such as 512x28, or 512x2+peers; repeatable."),
    ] = None,
    size: Annotated[
        str,
        typer.Option(help="Default cases: 'quick' (minutes), 'standard' (40 minutes on two cores) or 'full' (longer)."),
    ] = "standard",
    batch_size: Annotated[int, typer.Option(min=1, help="Images generated together.")] = 4,
    steps: Steps = None,
    prompts: Prompts = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every variant for each linear.")] = 5,
    model_rounds: Annotated[int, typer.Option(min=1, help="Turns of every variant for steps and generations.")] = 3,
    at_once: Annotated[
        int, typer.Option(min=3, help="Variants in memory together; speed ratios are taken among them.")
    ] = 8,
    out: Annotated[Path, typer.Option(help="JSON to write; the Markdown goes beside it.")] = Path("benchmark.json"),
    device: Device = None,
) -> None:
    """Time linears, one denoising step and whole generations, compared with float models and other packages, in turns.

    Prints one Markdown report: bars and whether they are met, speed ratios, errors, weight bytes, peak memory, cold
    compile times; at its end one sentence, how much faster and smaller the quantized model is here. OMP_NUM_THREADS sets
    the threads.
    """
    check_writable_file(out)
    from fp4dit_ao.cli import benchmark as run

    run.benchmark(
        model, parts=part or [], recipes=recipe, peers=peer or [], linear=linear or [], transformer=transformer or [],
        size=size, batch_size=batch_size, steps=steps, prompts=prompts, rounds=rounds, model_rounds=model_rounds,
        at_once=at_once, device=device, out=out,
    )  # fmt: skip
