"""Plug-in point "metric": what judges images, beside PSNR and SSIM, which every evaluation has."""

from collections.abc import Sequence

from fp4dit_ao.evaluation.image_metrics.clip_score import ClipScore
from fp4dit_ao.evaluation.image_metrics.cmmd import Cmmd
from fp4dit_ao.evaluation.image_metrics.dino import DinoSimilarity
from fp4dit_ao.evaluation.image_metrics.frechet import FrechetDistance
from fp4dit_ao.evaluation.image_metrics.kernel_distance import KernelDistance
from fp4dit_ao.evaluation.image_metrics.metric import ImageMetric, PairMetric, PromptMetric, SetMetric
from fp4dit_ao.util.registry import Registry

__all__ = ["METRICS", "ImageMetric", "PairMetric", "PromptMetric", "SetMetric", "open_metrics"]

METRICS: Registry[type[ImageMetric]] = Registry("metric")

METRICS.register(
    "clip", ClipScore, summary="How well an image fits its prompt: 100 times the cosine of their CLIP embeddings.",
    source="CLIPScore, arXiv 2104.08718", cost="a CLIP model of transformers",
)  # fmt: skip
METRICS.register(
    "dino", DinoSimilarity, summary="Cosine of an image's and its original's class tokens.",
    source="DreamBooth, arXiv 2208.12242, section 4", cost="a DINOv2, DINO or other image model of transformers",
)  # fmt: skip
METRICS.register(
    "fid", FrechetDistance, summary="Fréchet distance of all images' features to the original's, and to real images'.",
    source="arXiv 1706.08500, equation 6", cost="Inception by the extra fid, or an image model of transformers; thousands of images",
)  # fmt: skip
METRICS.register(
    "kid", KernelDistance, summary="Squared MMD of the same features with a cubic kernel, times 1000; unbiased.",
    source="arXiv 1801.01401, section 4", cost="as fid; hundreds of images",
)  # fmt: skip
METRICS.register(
    "cmmd", Cmmd, summary="Squared MMD of CLIP embeddings with a Gaussian kernel, times 1000.",
    source="arXiv 2401.09603, equation 4", cost="a CLIP model of transformers; hundreds of images",
)  # fmt: skip


def open_metrics(wanted: Sequence[str], device: str) -> list[ImageMetric]:
    """Metrics by name, each with its network loaded.

    Args:
        wanted: ``NAME``, or ``NAME=WEIGHTS`` with a folder, file or hub id.
        device: where networks run.

    Raises:
        ValueError: there is no such metric, or one is named twice with the same weights.
        OSError: weights cannot be had.
    """
    if repeated := [one for index, one in enumerate(wanted) if one in wanted[:index]]:
        raise ValueError(f"--metric {repeated[0]} is given twice")
    found = []
    for one in wanted:
        name, _, weights = one.partition("=")
        found.append(METRICS.find(name)(weights or None, device))
    return found
