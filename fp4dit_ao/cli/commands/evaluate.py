"""Options of ``fp4dit-ao evaluate``."""

from pathlib import Path
from typing import Annotated

import typer

from fp4dit_ao.cli.call_options import call_options
from fp4dit_ao.cli.options import Call, Compile, Device, Dtype, Steps
from fp4dit_ao.cli.output_paths import check_writable_file


def evaluate(
    model: Annotated[
        list[str], typer.Argument(help="A quantized pipeline's folder, or any MODEL; several are compared.")
    ],
    against: Annotated[str, typer.Option(help="MODEL that it was made from.")],
    prompts: Annotated[Path | None, typer.Option(help="Prompts, one a line, or a file of --prompt-set.")] = None,
    prompt_set: Annotated[
        str, typer.Option(help="How the file is read: lines, coco, mjhq, drawbench, parti, hpsv2.")
    ] = "lines",
    count: Annotated[
        int, typer.Option(min=2, help="Prompts to use: the first of the file, or spread over the reference's.")
    ] = 100,
    sample: Annotated[str, typer.Option(help="'first', or 'shuffled' as deepcompressor samples its 5000.")] = "first",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds per prompt: 0, 1, …")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    seeding: Annotated[
        str,
        typer.Option(help="Noise: 'distinct' for every image, 'same' for all of a seed, 'name' from a prompt's name."),
    ] = "distinct",
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="Also judge by NAME or NAME=WEIGHTS (folder, file, hub id); `methods metric` lists. Repeatable."
        ),
    ] = None,
    real: Annotated[Path | None, typer.Option(help="Folder of real images, for metrics of whole sets.")] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            help="Draw the original again: 'batch' size, 'compiled', attention 'kernel'; or 'none'. Repeatable."
        ),
    ] = None,
    steps: Steps = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images generated together.")] = 16,
    out: Annotated[Path, typer.Option(help="JSON to write; page and images go beside it.")] = Path("evaluation.json"),
    images: Annotated[Path | None, typer.Option(help="Folder where images are kept, for other runs too.")] = None,
    report: Annotated[bool, typer.Option(help="Write an HTML page with the worst images.")] = True,
    shown: Annotated[int, typer.Option(min=1, help="Images of each model on that page.")] = 24,
    compile: Compile = False,
    device: Device = None,
    devices: Annotated[str | None, typer.Option(help="Share images out, such as cuda:0,cuda:1.")] = None,
    shard: Annotated[
        str | None, typer.Option(help="Only draw part K of N, as K/N from 0; for several machines.")
    ] = None,
    call: Call = None,
    dtype: Dtype = "stored",
) -> None:
    """Print a Markdown table of how close MODEL's images are to those of the model that it was made from.

    Images are kept: a run that is interrupted goes on, and another metric needs no new ones.
    """
    check_writable_file(out)
    arguments = call_options(call, steps)
    if device is not None and devices is not None:
        raise ValueError("give --device or --devices, not both")
    from fp4dit_ao.cli import evaluate as run

    run.evaluate(
        model, against,
        run.WantedImages(prompts, prompt_set, count, sample, tuple(range(first_seed, first_seed + seeds)), seeding, arguments),
        run.Procedure(
            batch_size, compile, tuple(devices.split(",")) if devices else (device,), run.shard_of(shard), dtype,
            () if baseline == ["none"] else tuple(baseline or ["batch"]), tuple(metric or ()), real,
        ),
        run.OutputFiles(
            out, out.with_suffix(".html") if report else None, images or out.with_name(f"{out.stem}_images"), shown
        ),
    )  # fmt: skip
