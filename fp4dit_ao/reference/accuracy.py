"""Prompt accuracy: share of generated pictures whose nearest real emoji is the one that the prompt names.

Run ``python -m fp4dit_ao.reference.accuracy --help``. The reference pipeline knows a few hundred prompts, each with one
true picture, so this question has an exact answer and stands in for a CLIP score. A picture is compared in the space of
its RGB values averaged over 16 x 16 cells (4 px each), flattened to 768 numbers: fine enough to tell every pair of
trained emoji apart, coarse enough to forgive the autoencoder's blur.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped]
from tqdm import tqdm

from fp4dit_ao import reference

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

CELLS = 16

Floats = NDArray[np.float32]


def features(images: NDArray[np.generic]) -> Floats:
    """RGB averaged over 16 x 16 cells and flattened: float32 ``(n, 768)`` in [0, 1].

    Args:
        images: ``(n, h, w, 3)``, ``h`` and ``w`` multiples of 16; uint8, or floating-point in [0, 1].

    Raises:
        ValueError: another shape.
    """
    if images.ndim != 4 or images.shape[3] != 3 or images.shape[1] % CELLS or images.shape[2] % CELLS:
        raise ValueError(f"images must have shape (n, h, w, 3) with h and w multiples of {CELLS}, found {images.shape}")
    scale = 255 if images.dtype == np.uint8 else 1
    n, height, width, _ = images.shape
    cells = images.reshape(n, CELLS, height // CELLS, CELLS, width // CELLS, 3).mean(axis=(2, 4), dtype=np.float64)
    flat: Floats = (cells.reshape(n, -1) / scale).astype(np.float32)
    return flat


def nearest(images: NDArray[np.generic], candidates: NDArray[np.generic] | None = None) -> NDArray[np.int64]:
    """Index of the candidate picture nearest to each image, by Euclidean distance between :func:`features`.

    Args:
        images: see :func:`features`.
        candidates: like ``images``; all trained emoji (:func:`fp4dit_ao.reference.pictures`) if None.
    """
    real = features(reference.pictures() if candidates is None else candidates)
    distances = ((features(images)[:, None] - real[None]) ** 2).sum(axis=2)
    closest: NDArray[np.int64] = distances.argmin(axis=1)
    return closest


def prompt_accuracy(
    images: NDArray[np.generic], prompt_indices: Sequence[int] | NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Whether the trained emoji nearest to each image is the prompted one: bool ``(n,)``; its mean is the prompt
    accuracy.

    Args:
        images: see :func:`features`.
        prompt_indices: position of each image's prompt in :func:`fp4dit_ao.reference.prompts`.

    Raises:
        ValueError: another number of prompts than of images.
    """
    if len(images) != len(prompt_indices):
        raise ValueError(f"one prompt index per image is needed, found {len(prompt_indices)} for {len(images)} images")
    right: NDArray[np.bool_] = nearest(images) == np.asarray(prompt_indices)
    return right


def spread_out(count: int) -> list[int]:
    """Indices of ``count`` prompts, evenly spaced over all of them, so that every category is represented."""
    total = len(reference.prompts())
    if not 1 <= count <= total:
        raise ValueError(f"{count} prompts asked for, the reference pipeline knows {total}")
    return [i * total // count for i in range(count)]


def batches(
    pipe: "DiffusionPipeline", prompts: Sequence[str], seeds: Sequence[int], batch_size: int = 16, **call: object
) -> Iterator[NDArray[np.uint8]]:
    """Generates the prompts batch by batch; yields uint8 ``(b, 64, 64, 3)``.

    Every image has its own generator, so that it does not depend on its batch.

    Args:
        call: arguments that override :func:`fp4dit_ao.reference.generation`.
    """
    import torch

    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        options = reference.generation() | {"output_type": "np"} | call
        images = pipe(list(prompts[part]), generator=generators, **options).images
        yield (np.asarray(images) * 255).round().astype(np.uint8)


def grid(rows: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Joins lists of pictures, ``(n, h, w, 3)`` each, as the rows of one picture."""
    return np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)


def main(
    prompts: Annotated[int, typer.Option(help="How many prompts, spread evenly over all.")] = 200,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; the pipeline's own number if not given.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; the pipeline's own if not given.")] = None,
    seed: Annotated[int, typer.Option(help="The prompt at position i is generated from seed + i.")] = 0,
    batch_size: int = 20,
    model: Annotated[Path | None, typer.Option(help="Pipeline folder; the shipped one if not given.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Write 32 of the pairs, real above generated, as PNG.")] = None,
) -> None:
    """Prints the prompt accuracy of a pipeline that draws the reference's emoji."""
    import torch
    from diffusers import PixArtSigmaPipeline
    from PIL import Image

    pipe = PixArtSigmaPipeline.from_pretrained(model or reference.path(), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, object] = {} if steps is None else {"num_inference_steps": steps}
    call |= {} if guidance is None else {"guidance_scale": guidance}
    chosen = spread_out(prompts)
    texts = [reference.prompts()[i] for i in chosen]
    images: list[NDArray[np.uint8]] = []
    with tqdm(total=prompts, desc="images") as bar:
        for part in batches(pipe, texts, [seed + i for i in chosen], batch_size, **call):
            images.append(part)
            bar.update(len(part))
    generated = np.concatenate(images)
    right = prompt_accuracy(generated, chosen)
    low, high = stats.binomtest(int(right.sum()), prompts).proportion_ci(method="wilson")
    options = reference.generation() | call
    setting = f"{options['num_inference_steps']} steps, guidance {options['guidance_scale']}, seeds {seed} + i"
    print(f"prompt accuracy {right.mean():.1%} (95 % interval {low:.1%} to {high:.1%}; {prompts} prompts, {setting})")
    for i in np.flatnonzero(~right):
        print(f"  {texts[i]!r} looks like {reference.prompts()[nearest(generated[i : i + 1])[0]]!r}")
    if picture is not None:
        count = min(32, prompts)
        shown = [i * prompts // count for i in range(count)]
        rows = []
        for start in range(0, len(shown), 16):
            part_shown = shown[start : start + 16]
            rows += [reference.pictures()[[chosen[i] for i in part_shown]], generated[part_shown]]
        Image.fromarray(grid(rows)).save(picture, optimize=True)
        print(f"real above generated: {picture}")


if __name__ == "__main__":
    typer.run(main)
