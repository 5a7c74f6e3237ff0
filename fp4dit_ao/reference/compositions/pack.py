"""Packs what training wrote: ``python -m fp4dit_ao.reference.compositions.pack --help``.

Makes the pipeline's folder (bfloat16), the record and curve of the run and the pictures of the model card, and prints
the card's tables.
"""

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

from fp4dit_ao.reference import statistics
from fp4dit_ao.reference.compositions import accuracy
from fp4dit_ao.reference.compositions.architecture import GENERATION
from fp4dit_ao.reference.compositions.assembly import assemble
from fp4dit_ao.reference.compositions.scenes import prompt
from fp4dit_ao.reference.saving import save_pipeline

HERE = Path(__file__).parent


def draw_curve(record: dict[str, object], path: Path) -> None:
    """Draws the loss of a run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    steps, losses = zip(*record["loss"], strict=True)  # type: ignore[misc]
    axes.plot(steps, losses, linewidth=1)
    title = f"{record['step']} steps, {float(str(record['seconds'])) / 60:.1f} min, {record['machine']}"
    axes.set(title=title, xlabel="step", ylabel="loss (smoothed)", yscale="log")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=90)


def main(
    run: Annotated[Path, typer.Option(help="Folder that training wrote with --out.")],
    out: Annotated[Path, typer.Option(help="Folder of the pipeline; by default its place in the package.")] = Path(
        __file__
    ).parent,
    prompts: Annotated[int, typer.Option(help="Prompts of each row of the accuracy; 0 for none.")] = 200,
    device: str = "cpu",
) -> None:
    """Write the pipeline's folder."""
    import torch

    out.mkdir(parents=True, exist_ok=True)
    pipe = assemble(run)
    pipe.set_progress_bar_config(disable=True)
    texts = [prompt(scene) for scene in accuracy.random_scenes(16, seed=1)]
    maxima = statistics.token_maxima(pipe, texts, **GENERATION)
    print(statistics.table(pipe.transformer, maxima))
    statistics.draw(pipe.transformer, maxima, out / "statistics.png")
    save_pipeline(pipe, torch.bfloat16, GENERATION, out)
    shutil.copyfile(run / "training.json", out / "training.json")
    draw_curve(json.loads((run / "training.json").read_text(encoding="utf-8")), out / "training.png")
    if prompts:
        accuracy.main(prompts=prompts, model=out, device=device, picture=out / "samples.png")


if __name__ == "__main__":
    typer.run(main)
