"""Fidelity of a quantized pipeline: its images compared with the original's at equal prompts and seeds."""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from fp4dit_ao import _compat
from fp4dit_ao.calibration.pipeline_arguments import call_arguments
from fp4dit_ao.evaluation import metrics
from fp4dit_ao.evaluation.environment import environment, one_line
from fp4dit_ao.evaluation.metrics import Estimate, Images
from fp4dit_ao.reference.accuracy import prompt_accuracy
from fp4dit_ao.util.atomic_files import write_text
from fp4dit_ao.util.markdown import markdown_table

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_SEED_STRIDE = 1_000_003
"""Prime larger than any number of prompts, so that (seed, prompt) pairs get distinct generator seeds."""


def image_seed(seed: int, prompt_index: int) -> int:
    """Generator seed of one image, which depends on its seed and prompt only, not on the batch."""
    return seed * _SEED_STRIDE + prompt_index


def generate(
    pipe: "DiffusionPipeline",
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    batch_size: int = 16,
    progress: str | None = "images",
    **call: object,
) -> Images:
    """Generates every prompt with every seed.

    Args:
        pipe: a diffusers text-to-image pipeline.
        prompts: at least one prompt.
        seeds: at least one seed; every image has its own generator, seeded by :func:`image_seed`.
        batch_size: images generated together.
        progress: title of the progress bar; None for no bar.
        **call: further arguments of the pipeline, such as ``num_inference_steps``, on top of its ``generation.json``.

    Returns:
        Images, uint8 ``(seeds, prompts, height, width, 3)``.

    Raises:
        ValueError: there are no prompts or no seeds, the batch size is below 1, or the pipeline does not take an
            argument.
    """
    if not prompts or not seeds or batch_size < 1:
        raise ValueError(
            f"generate needs at least one prompt, one seed and a batch of one; found {len(prompts)} prompts, "
            f"{len(seeds)} seeds, batch_size={batch_size}"
        )
    arguments = call_arguments(pipe, **call) | {"output_type": "np"}
    wanted = [(seed, index) for seed in seeds for index in range(len(prompts))]
    images: list[Images] = []
    with _quiet(pipe), tqdm(total=len(wanted), desc=progress, disable=progress is None, unit="img") as bar:
        for start in range(0, len(wanted), batch_size):
            part = wanted[start : start + batch_size]
            generators = [torch.Generator().manual_seed(image_seed(seed, index)) for seed, index in part]
            texts = [prompts[index] for _, index in part]
            output = pipe(texts, generator=generators, **arguments).images
            images.append((np.asarray(output) * 255).round().astype(np.uint8))
            bar.update(len(part))
    flat = np.concatenate(images)
    return flat.reshape(len(seeds), len(prompts), *flat.shape[1:])


@contextlib.contextmanager
def _quiet(pipe: "DiffusionPipeline") -> Iterator[None]:
    """Context in which the pipeline shows no progress bar of its own."""
    before = _compat.progress_bar_config(pipe)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


@dataclass(frozen=True)
class Fidelity:
    """Metrics of every image of one variant.

    Attributes:
        name: name of the variant.
        psnr: PSNR against the original in dB, ``(seeds, prompts)``, at most :data:`metrics.PSNR_CAP`.
        ssim: SSIM against the original, ``(seeds, prompts)``.
        right: whether each image shows its prompt, bool ``(seeds, prompts)``; None if that cannot be judged.
        seconds: generation time per image.
        notes: texts of further columns, by the column's name.
    """

    name: str
    psnr: metrics.Floats
    ssim: metrics.Floats
    right: NDArray[np.bool_] | None = None
    seconds: float = float("nan")
    notes: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of(
        name: str,
        images: Images,
        originals: Images,
        prompt_indices: Sequence[int] | None = None,
        seconds: float = float("nan"),
        notes: dict[str, str] | None = None,
    ) -> "Fidelity":
        """Compares ``images`` with ``originals``, both uint8 ``(seeds, prompts, h, w, 3)``.

        Args:
            prompt_indices: positions of the prompts in ``reference.prompts()``, if the model is the reference pipeline.
        """
        right = None if prompt_indices is None else _right(images, prompt_indices)
        psnr, ssim = metrics.psnr(images, originals), metrics.ssim(images, originals)
        return Fidelity(name, psnr, ssim, right, seconds, dict(notes or {}))

    def to_dict(self) -> dict[str, object]:
        """Returns all fields for JSON; the inverse of :meth:`from_dict`."""
        return {
            "name": self.name, "psnr": self.psnr.round(4).tolist(), "ssim": self.ssim.round(6).tolist(),
            "right": None if self.right is None else self.right.astype(int).tolist(), "seconds": self.seconds,
            "notes": self.notes,
        }  # fmt: skip

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "Fidelity":
        """Reads what :meth:`to_dict` returned."""
        right = None if data["right"] is None else np.asarray(data["right"], dtype=bool)
        psnr, ssim = np.asarray(data["psnr"], dtype=np.float64), np.asarray(data["ssim"], dtype=np.float64)
        return Fidelity(data["name"], psnr, ssim, right, data["seconds"], data["notes"])

    def estimates(self) -> dict[str, Estimate]:
        """Means and 95 % intervals: ``psnr``, ``ssim`` and, if judged, ``accuracy``."""
        found = {"psnr": metrics.estimate(self.psnr), "ssim": metrics.estimate(self.ssim)}
        return found if self.right is None else found | {"accuracy": metrics.estimate(self.right)}


def _right(images: Images, prompt_indices: Sequence[int]) -> NDArray[np.bool_]:
    return np.stack([prompt_accuracy(of_one_seed, prompt_indices) for of_one_seed in images])


@dataclass(frozen=True)
class Comparison:
    """Paired difference of two variants over the same prompts and seeds: means of ``first - second``."""

    first: str
    second: str
    psnr: Estimate
    ssim: Estimate
    accuracy: Estimate | None

    @staticmethod
    def of(first: Fidelity, second: Fidelity) -> "Comparison":
        """Compares two variants image by image."""
        accuracy = None
        if first.right is not None and second.right is not None:
            accuracy = metrics.estimate(first.right.astype(np.float64) - second.right)
        psnr, ssim = metrics.estimate(first.psnr - second.psnr), metrics.estimate(first.ssim - second.ssim)
        return Comparison(first.name, second.name, psnr, ssim, accuracy)


@dataclass(frozen=True)
class Evaluation:
    """Several variants over the same prompts and seeds, printed as a table and saved as JSON.

    Attributes:
        variants: the variants, in the order of the table.
        settings: prompts, seeds, steps, … of the measurement.
        comparisons: paired differences to print.
        environment: hardware and versions of the measurement.
    """

    variants: list[Fidelity]
    settings: Mapping[str, object]
    comparisons: list[Comparison] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=environment)

    def markdown(self) -> str:
        """Markdown: the table, the settings and hardware, and the paired differences."""
        judged = any(variant.right is not None for variant in self.variants)
        notes = list(dict.fromkeys(name for variant in self.variants for name in variant.notes))
        head = ["", *notes, "PSNR, dB", "SSIM", *(["prompt accuracy"] if judged else []), "s / image"]
        rows = []
        for variant in self.variants:
            e = variant.estimates()
            cells = [variant.name, *(variant.notes.get(name, "") for name in notes)]
            cells += [_psnr_text(e["psnr"]), e["ssim"].text(3)]
            cells += [e["accuracy"].text(1, percent=True) if "accuracy" in e else ""] if judged else []
            rows.append([*cells, "" if np.isnan(variant.seconds) else f"{variant.seconds:.2f}"])
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items() if isinstance(value, str | int))
        text = (
            markdown_table(head, rows) + "\n\nAgainst the original at equal seeds, with 95 % intervals over prompts; "
        )
        text += f"{settings}. {one_line()}"
        if self.comparisons:
            head = ["paired difference", "PSNR, dB", "SSIM", *(["prompt accuracy"] if judged else [])]
            rows = [
                [f"{c.first} − {c.second}", c.psnr.text(2), c.ssim.text(4)]
                + ([c.accuracy.text(1, percent=True) if c.accuracy else ""] if judged else [])
                for c in self.comparisons
            ]
            text += "\n\n" + markdown_table(head, rows)
        return text + "\n"

    def to_dict(self) -> dict[str, object]:
        """Returns everything for JSON, metrics of every image included."""
        return {
            "settings": self.settings,
            "environment": self.environment,
            "variants": [
                {**v.to_dict(), "estimates": {k: asdict(e) for k, e in v.estimates().items()}} for v in self.variants
            ],
            "comparisons": [asdict(c) for c in self.comparisons],
        }

    def save(self, path: Path) -> None:
        """Writes :meth:`to_dict` as JSON, whole or not at all."""
        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")


def _psnr_text(estimate: Estimate) -> str:
    return "identical" if estimate.low >= metrics.PSNR_CAP else estimate.text(2)


def timed_generate(
    pipe: "DiffusionPipeline", prompts: Sequence[str], seeds: Sequence[int], **options: Any
) -> tuple[Images, float]:
    """Images of :func:`generate`, and the seconds per image."""
    start = time.perf_counter()
    images = generate(pipe, prompts, seeds, **options)
    return images, (time.perf_counter() - start) / (len(prompts) * len(seeds))
