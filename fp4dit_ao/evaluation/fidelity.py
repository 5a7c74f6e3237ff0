"""Fidelity of a quantized pipeline: its images compared with the original's at equal prompts and seeds."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from fp4dit_ao.calibration.pipeline_arguments import call_arguments
from fp4dit_ao.evaluation import metrics
from fp4dit_ao.evaluation.drawing import draw_batch, quiet
from fp4dit_ao.evaluation.environment import describe, environment
from fp4dit_ao.evaluation.metrics import Estimate, Images
from fp4dit_ao.evaluation.seeding import image_seed
from fp4dit_ao.evaluation.tables import differences_table, variants_table
from fp4dit_ao.reference.accuracy import prompt_accuracy
from fp4dit_ao.util.atomic_files import write_text
from fp4dit_ao.util.markdown import markdown_table

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


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
    arguments = call_arguments(pipe, **call)
    wanted = [(seed, index) for seed in seeds for index in range(len(prompts))]
    images: list[Images] = []
    with quiet(pipe), tqdm(total=len(wanted), desc=progress, disable=progress is None, unit="img") as bar:
        for start in range(0, len(wanted), batch_size):
            part = wanted[start : start + batch_size]
            own = [image_seed(seed, index) for seed, index in part]
            images.append(draw_batch(pipe, [prompts[index] for _, index in part], own, arguments))
            bar.update(len(part))
    flat = np.concatenate(images)
    return flat.reshape(len(seeds), len(prompts), *flat.shape[1:])


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
        scores: of every image, ``(seeds, prompts)``, by the title of a metric; see ``evaluation.image_metrics``.
        distances: of all images together, by the title of a metric and what they are compared with.
    """

    name: str
    psnr: metrics.Floats
    ssim: metrics.Floats
    right: NDArray[np.bool_] | None = None
    seconds: float = float("nan")
    notes: dict[str, str] = field(default_factory=dict)
    scores: dict[str, metrics.Floats] = field(default_factory=dict)
    distances: dict[str, float] = field(default_factory=dict)

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
            "notes": self.notes, "scores": {title: values.round(6).tolist() for title, values in self.scores.items()},
            "distances": self.distances,
        }  # fmt: skip

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "Fidelity":
        """Reads what :meth:`to_dict` returned."""
        right = None if data["right"] is None else np.asarray(data["right"], dtype=bool)
        psnr, ssim = np.asarray(data["psnr"], dtype=np.float64), np.asarray(data["ssim"], dtype=np.float64)
        scores = {title: np.asarray(values, dtype=np.float64) for title, values in data.get("scores", {}).items()}
        distances = dict(data.get("distances", {}))
        return Fidelity(data["name"], psnr, ssim, right, data["seconds"], data["notes"], scores, distances)

    @property
    def identical(self) -> bool:
        """Whether every image is the original's."""
        return bool((self.psnr >= metrics.PSNR_CAP).all())

    def estimates(self) -> dict[str, Estimate]:
        """Means and 95 % intervals: ``psnr``, ``ssim``, every score by its title and, if judged, ``accuracy``."""
        found = {"psnr": metrics.estimate(self.psnr), "ssim": metrics.estimate(self.ssim)}
        found |= {title: metrics.estimate(values) for title, values in self.scores.items()}
        return found if self.right is None else found | {"accuracy": metrics.estimate(self.right)}


def _right(images: Images, prompt_indices: Sequence[int]) -> NDArray[np.bool_]:
    return np.stack([prompt_accuracy(of_one_seed, prompt_indices) for of_one_seed in images])


@dataclass(frozen=True)
class Comparison:
    """Paired difference of two variants over the same prompts and seeds: means of ``first - second``.

    ``psnr`` and ``ssim`` are None if one of the two is the original itself, which they are measured against.
    """

    first: str
    second: str
    psnr: Estimate | None
    ssim: Estimate | None
    accuracy: Estimate | None
    scores: dict[str, Estimate] = field(default_factory=dict)

    @staticmethod
    def of(first: Fidelity, second: Fidelity) -> "Comparison":
        """Compares two variants image by image."""
        accuracy = None
        if first.right is not None and second.right is not None:
            accuracy = metrics.estimate(first.right.astype(np.float64) - second.right)
        psnr = ssim = None
        if not first.identical and not second.identical:
            psnr, ssim = metrics.estimate(first.psnr - second.psnr), metrics.estimate(first.ssim - second.ssim)
        both = [title for title in first.scores if title in second.scores]
        scores = {title: metrics.estimate(first.scores[title] - second.scores[title]) for title in both}
        return Comparison(first.name, second.name, psnr, ssim, accuracy, scores)


@dataclass(frozen=True)
class Evaluation:
    """Several variants over the same prompts and seeds, printed as a table and saved as JSON.

    Attributes:
        variants: the variants, in the order of the table.
        settings: prompts, seeds, steps, … of the measurement.
        comparisons: paired differences to print.
        environment: hardware and versions of the measurement.
        digits: digits after the point, by the title of a score or distance; 3 if not given.
    """

    variants: list[Fidelity]
    settings: Mapping[str, object]
    comparisons: list[Comparison] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=environment)
    digits: Mapping[str, int] = field(default_factory=dict)

    def markdown(self) -> str:
        """Markdown: the table, the settings and hardware, and the paired differences."""
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items() if isinstance(value, str | int))
        text = markdown_table(*variants_table(self))
        text += f"\n\nAgainst the original at equal seeds, with 95 % intervals over prompts; {settings}. "
        text += describe(self.environment)
        if self.comparisons:
            text += "\n\n" + markdown_table(*differences_table(self))
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
            "digits": dict(self.digits),
        }

    def save(self, path: Path) -> None:
        """Writes :meth:`to_dict` as JSON, whole or not at all."""
        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")


def timed_generate(
    pipe: "DiffusionPipeline", prompts: Sequence[str], seeds: Sequence[int], **options: Any
) -> tuple[Images, float]:
    """Images of :func:`generate`, and the seconds per image."""
    start = time.perf_counter()
    images = generate(pipe, prompts, seeds, **options)
    return images, (time.perf_counter() - start) / (len(prompts) * len(seeds))
