"""Accuracy of the composition pipeline: ``python -m fp4dit_ao.reference.compositions.accuracy --help``.

Draws random prompts, among them only such with a combination that no training picture has, and judges attribute by
attribute. The judge's own accuracy, on real pictures of the same prompts, stands beside it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped]
from torch import Tensor

from fp4dit_ao.reference.accuracy import batches, grid
from fp4dit_ao.reference.compositions import generation
from fp4dit_ao.reference.compositions.architecture import build_tokenizer
from fp4dit_ao.reference.compositions.assembly import load
from fp4dit_ao.reference.compositions.judge import ATTRIBUTES, Judge, verdict
from fp4dit_ao.reference.compositions.scenes import Scenes, prompt
from fp4dit_ao.reference.compositions.stickers import Painter

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Scene = list[int]


def random_scenes(count: int, seed: int, held_out: bool = True, tables: Scenes | None = None) -> list[Scene]:
    """Random scenes; with at least one combination that no training picture has, or only with trained ones."""

    tables = tables or Scenes(build_tokenizer())
    return tables.sample(count, torch.Generator().manual_seed(seed), held_out).tolist()


def real_pictures(scenes: Sequence[Scene], seed: int, tables: Scenes) -> Tensor:
    """A true picture of every scene, float32 ``(n, 3, 64, 64)`` in [-1, 1]."""
    drawn = tables.place(torch.tensor(scenes), torch.Generator().manual_seed(seed))
    pictures: Tensor = Painter()(drawn)
    return pictures


def tensor_of(images: NDArray[np.uint8]) -> Tensor:
    """Generated images ``(n, 64, 64, 3)`` as the judge takes them."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def marks(judge: Judge, pictures: Tensor, scenes: Sequence[Scene]) -> dict[str, list[float]]:
    """Marks of all pictures, by attribute; where a prompt does not ask for an attribute, its list is shorter."""
    found: dict[str, list[float]] = {name: [] for name in ATTRIBUTES}
    device = judge.colours.device
    for start in range(0, len(pictures), 64):
        part = slice(start, start + 64)
        for scene, seen in zip(scenes[part], judge(pictures[part].to(device)), strict=True):
            for name, mark in verdict(scene, seen).items():
                if mark is not None:
                    found[name].append(mark)
    return found


def draw(
    pipe: "DiffusionPipeline", scenes: Sequence[Scene], seed: int, batch_size: int, **call: object
) -> NDArray[np.uint8]:
    """Pictures of the scenes' prompts, uint8 ``(n, 64, 64, 3)``; that at position i is from seed + i."""
    prompts = [prompt(scene) for scene in scenes]
    seeds = [seed + i for i in range(len(prompts))]
    return np.concatenate(list(batches(pipe, prompts, seeds, batch_size, **(generation() | call))))


def row(name: str, found: dict[str, list[float]]) -> str:
    """Row of the table: the mean mark of every attribute, and the 95 % interval of the last."""
    cells = [f"{np.mean(found[attribute]):.1%}" for attribute in ATTRIBUTES]
    right = found["all"]
    low, high = stats.binomtest(int(sum(right)), len(right)).proportion_ci(method="wilson")
    return f"| {name} | " + " | ".join(cells) + f" ({low:.1%} to {high:.1%}) |"


HEAD = "| pictures | emoji | where | colour | count | all right (95 % interval) |\n|---|---|---|---|---|---|"


def main(
    prompts: Annotated[int, typer.Option(help="How many prompts of each row.")] = 200,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; the pipeline's own number if not given.")] = None,
    guidance: Annotated[list[float] | None, typer.Option(help="Guidance scale, or several for a row of each.")] = None,
    seed: Annotated[int, typer.Option(help="Of the prompts; picture i is generated from seed + i.")] = 0,
    batch_size: int = 20,
    device: str = "cpu",
    model: Annotated[
        Path | None, typer.Option(help="Pipeline, or what training wrote; the packed one if not given.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Write 32 of the pairs, real above generated, as PNG.")] = None,
) -> None:
    """Prints a table of accuracy by attribute: held-out combinations, trained ones, and real pictures."""
    from PIL import Image

    pipe = load(model).to(device)
    pipe.set_progress_bar_config(disable=True)
    tables, judge = Scenes(build_tokenizer()), Judge().to(device)
    call: dict[str, object] = {} if steps is None else {"num_inference_steps": steps}
    print(HEAD)
    held = random_scenes(prompts, seed, tables=tables)
    real = real_pictures(held, seed, tables)
    print(row("real", marks(judge, real, held)), flush=True)
    shown = None
    for scale in guidance or [float(str(generation()["guidance_scale"]))]:
        for name, held_out in (("held-out combinations", True), ("trained combinations", False)):
            scenes = held if held_out else random_scenes(prompts, seed, held_out, tables)
            images = draw(pipe, scenes, seed, batch_size, guidance_scale=scale, **call)
            shown = images if shown is None else shown
            print(row(f"{name}, guidance {scale:g}", marks(judge, tensor_of(images), scenes)), flush=True)
    if picture is not None and shown is not None:
        true = ((real[:32] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        rows = [part for i in range(0, len(true), 16) for part in (true[i : i + 16], shown[:32][i : i + 16])]
        Image.fromarray(grid(rows)).save(picture, optimize=True)
        print(f"real above generated: {picture}")


if __name__ == "__main__":
    typer.run(main)
