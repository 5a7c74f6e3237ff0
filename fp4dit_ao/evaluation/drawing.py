"""Drawing images with a pipeline, in batches that stay the same however often a run is interrupted or shared out."""

import contextlib
import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm.auto import tqdm

from fp4dit_ao import _compat
from fp4dit_ao.calibration.pipeline_arguments import CallArguments, call_arguments
from fp4dit_ao.evaluation.kept_images import KeptImages
from fp4dit_ao.evaluation.metrics import Images
from fp4dit_ao.evaluation.prompt_sets import Prompt
from fp4dit_ao.util.atomic_files import write_text

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_TIMES = "drawn-*.json"


def draw_batch(
    pipe: "DiffusionPipeline", texts: Sequence[str], seeds: Sequence[int], arguments: CallArguments
) -> Images:
    """Images uint8 ``(n, h, w, 3)``, or videos ``(n, frames, h, w, 3)``, of ``n`` prompts, each from its own generator."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    output = pipe(list(texts), generator=generators, **{**arguments, "output_type": "np"})
    drawn = output.frames if hasattr(output, "frames") else output.images
    return (np.asarray(drawn) * 255).round().astype(np.uint8)


@contextlib.contextmanager
def quiet(pipe: "DiffusionPipeline") -> Iterator[None]:
    """Context in which the pipeline shows no progress bar of its own."""
    before = _compat.progress_bar_config(pipe)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


def missing_batches(kept: KeptImages, batch_size: int, shard: tuple[int, int] = (0, 1)) -> list[list[tuple[int, int]]]:
    """Batches of a shard of which an image is missing, as positions (seed, prompt).

    Cut from the list of all images, so that an image has the same neighbours, and the same bits, in every run.
    """
    every = [(seed, prompt) for seed in range(kept.seeds) for prompt in range(kept.prompts)]
    batches = [every[start : start + batch_size] for start in range(0, len(every), batch_size)][shard[0] :: shard[1]]
    missing = set(kept.missing())
    return [batch for batch in batches if missing.intersection(batch)]


def draw_missing(
    pipe: "DiffusionPipeline",
    kept: KeptImages,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    seed_of: Callable[[int, int, Prompt], int],
    *,
    batch_size: int,
    shard: tuple[int, int] = (0, 1),
    progress: str | None = None,
    **call: object,
) -> None:
    """Draws what ``kept`` lacks of every prompt with every seed, by :func:`missing_batches`.

    Args:
        pipe: a diffusers text-to-image pipeline.
        kept: where images go.
        prompts: as many as ``kept.prompts``.
        seeds: as many as ``kept.seeds``.
        seed_of: an entry of :data:`fp4dit_ao.evaluation.seeding.SEEDINGS`.
        batch_size: images drawn together.
        shard: ``(k, n)`` draws every ``n``-th batch, from the ``k``-th.
        progress: title of the progress bar; None for no bar.
        **call: arguments of the pipeline, on top of its ``generation.json``.
    """
    arguments = call_arguments(pipe, **call)
    batches = missing_batches(kept, batch_size, shard)
    total, spent = sum(map(len, batches)), 0.0
    with quiet(pipe), tqdm(total=total, desc=progress, disable=progress is None, unit="img") as bar:
        for batch in batches:
            start = time.perf_counter()
            own = [seed_of(seeds[seed], prompt, prompts[prompt]) for seed, prompt in batch]
            images = draw_batch(pipe, [prompts[prompt].text for _, prompt in batch], own, arguments)
            spent += time.perf_counter() - start
            for (seed, prompt), image in zip(batch, images, strict=True):
                kept.keep(seed, prompt, image)
            bar.update(len(batch))
    if total:
        name = _TIMES.replace("*", uuid.uuid4().hex[:8])
        write_text(kept.folder / name, json.dumps({"images": total, "seconds": spent}))


def seconds_per_image(kept: KeptImages) -> float:
    """Mean time of an image over all runs that drew some; NaN if none finished."""
    times = [json.loads(path.read_text(encoding="utf-8")) for path in kept.folder.glob(_TIMES)]
    images = sum(row["images"] for row in times)
    return sum(row["seconds"] for row in times) / images if images else float("nan")
