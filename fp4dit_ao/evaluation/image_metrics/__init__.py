"""Plug-in point "metric": what judges images, beside PSNR and SSIM, which every evaluation has."""

from collections.abc import Sequence

from fp4dit_ao.evaluation.image_metrics.clip_score import ClipScore
from fp4dit_ao.evaluation.image_metrics.cmmd import Cmmd
from fp4dit_ao.evaluation.image_metrics.dino import DinoSimilarity
from fp4dit_ao.evaluation.image_metrics.frechet import FrechetDistance
from fp4dit_ao.evaluation.image_metrics.hps import Hpsv2
from fp4dit_ao.evaluation.image_metrics.image_reward import ImageReward
from fp4dit_ao.evaluation.image_metrics.kernel_distance import KernelDistance
from fp4dit_ao.evaluation.image_metrics.lpips import Lpips
from fp4dit_ao.evaluation.image_metrics.metric import ImageMetric, PairMetric, PromptMetric, SetMetric, VideoMetric
from fp4dit_ao.evaluation.image_metrics.video import BackgroundConsistency, SubjectConsistency, TemporalFlicker
from fp4dit_ao.util.registry import Registry

__all__ = ["METRICS", "ImageMetric", "PairMetric", "PromptMetric", "SetMetric", "VideoMetric", "open_metrics"]

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
    "hpsv2", Hpsv2, summary="Which image people would prefer: 100 times the cosine of image and prompt by a tuned CLIP.",
    source="HPS v2, arXiv 2306.09341", cost="the authors' file, 2 GB",
)  # fmt: skip
METRICS.register(
    "image_reward", ImageReward, summary="How well people would like an image for its prompt; 0 is the average, 1 a deviation.",
    source="ImageReward, arXiv 2304.05977", cost="the authors' file, 2 GB",
)  # fmt: skip
METRICS.register(
    "lpips", Lpips, summary="How different an image looks from its original: features' distance, weighted as people see.",
    source="arXiv 1801.03924, equation 1", cost="torchvision's file of AlexNet or VGG-16",
)  # fmt: skip
METRICS.register(
    "fid", FrechetDistance, summary="Fréchet distance of all images' features to the original's, and to real images'.",
    source="arXiv 1706.08500, equation 6",
    cost="Inception by the extra fid, or an image model of transformers; thousands of images",
)  # fmt: skip
METRICS.register(
    "kid", KernelDistance, summary="Squared MMD of the same features with a cubic kernel, times 1000; unbiased.",
    source="arXiv 1801.01401, section 4", cost="as fid; hundreds of images",
)  # fmt: skip
METRICS.register(
    "cmmd", Cmmd, summary="Squared MMD of CLIP embeddings with a Gaussian kernel, times 1000.",
    source="arXiv 2401.09603, equation 4", cost="a CLIP model of transformers; hundreds of images",
)  # fmt: skip
METRICS.register(
    "flicker", TemporalFlicker, summary="How little a video's frames differ from the next.",
    source="VBench, arXiv 2311.17982, section 3.1", cost="none",
)  # fmt: skip
METRICS.register(
    "subject", SubjectConsistency, summary="Cosine of a video's frames with the first and the one before, by DINO.",
    source="VBench, arXiv 2311.17982, section 3.1", cost="a DINO model of transformers",
)  # fmt: skip
METRICS.register(
    "background", BackgroundConsistency, summary="Cosine of a video's frames with the first and the one before, by CLIP.",
    source="VBench, arXiv 2311.17982, section 3.1", cost="a CLIP model of transformers",
)  # fmt: skip


def open_metrics(wanted: Sequence[str], device: str) -> list[ImageMetric]:
    """Metrics by name, each with its network loaded.

    Args:
        wanted: ``NAME``, or ``NAME=WEIGHTS`` with a folder, file or hub id.
        device: where networks run.

    Raises:
        ValueError: there is no such metric, one is named twice with the same weights, or two would have one title.
        OSError: weights cannot be had.
    """
    if repeated := [one for index, one in enumerate(wanted) if one in wanted[:index]]:
        raise ValueError(f"--metric {repeated[0]} is given twice")
    found: dict[str, tuple[str, ImageMetric]] = {}
    for one in wanted:
        name, _, weights = one.partition("=")
        metric = METRICS.find(name)(weights or None, device)
        if metric.title in found:
            raise ValueError(
                f"--metric {one} and --metric {found[metric.title][0]} would both be called {metric.title}; leave one out, or "
                "give one of their folders another name"
            )
        found[metric.title] = one, metric
    return [metric for _, metric in found.values()]
