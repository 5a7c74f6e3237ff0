"""Judging kept images: PSNR, SSIM and any metrics, a batch of images at a time."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from fp4dit_ao.evaluation import metrics as built_in
from fp4dit_ao.evaluation.fidelity import Fidelity
from fp4dit_ao.evaluation.image_metrics import ImageMetric, PairMetric, PromptMetric, SetMetric, VideoMetric
from fp4dit_ao.evaluation.kept_images import KeptImages, folder_of_images, read_image
from fp4dit_ao.evaluation.metrics import Floats, Images
from fp4dit_ao.reference.accuracy import prompt_accuracy

BATCH = 16
"""Images that are read and judged together."""
ORIGINAL, REAL = "original", "real images"
"""What sets of images are compared with."""


class Judge:
    """Judges variants of one original.

    Args:
        originals: the original's images.
        texts: the prompts.
        metrics: beside PSNR and SSIM.
        real: folder of real images that sets are compared with, too.
        indices: positions of the prompts in ``reference.prompts()``, if the model is the reference pipeline.
        progress: called with a line of text that says what is being judged.
    """

    def __init__(
        self,
        originals: KeptImages,
        texts: Sequence[str],
        metrics: Sequence[ImageMetric],
        real: Path | None = None,
        indices: Sequence[int] | None = None,
        progress: Callable[[str], None] = lambda text: None,
    ):
        self.originals, self.texts, self.metrics, self.indices, self.progress = (
            originals,
            texts,
            metrics,
            indices,
            progress,
        )
        self.sets = [metric for metric in metrics if isinstance(metric, SetMetric)]
        self.known: dict[str, dict[str, Floats]] = {}
        if self.sets and real is not None:
            self.known[REAL] = self._real_features(real)

    def digits(self) -> dict[str, int]:
        """Digits after the point of every score and distance, by its title."""
        found = {metric.title: metric.digits for metric in self.metrics}
        return found | {f"{m.title} to {other}": m.digits for m in self.sets for other in (ORIGINAL, REAL)}

    def judge(self, name: str, kept: KeptImages, seconds: float, notes: dict[str, str] | None = None) -> Fidelity:
        """Every metric of one variant. The original itself has none of those that compare pairs, but PSNR's cap and SSIM 1."""
        self.progress(f"judging {name}")
        itself = kept.folder == self.originals.folder
        parts: dict[str, list[Floats]] = {}
        right: list[np.ndarray[tuple[int, ...], np.dtype[np.bool_]]] = []
        first = kept.read(0, 0)
        size = BATCH if first.ndim == 3 else max(1, BATCH // len(first))
        for positions, images in kept.batches(size):
            originals = images if itself else np.stack([self.originals.read(*position) for position in positions])
            for title, values in self._batch(positions, images, originals, itself).items():
                parts.setdefault(title, []).append(values)
            if self.indices is not None:
                right.append(prompt_accuracy(images, [self.indices[prompt] for _, prompt in positions]))
        whole = {title: np.concatenate(values) for title, values in parts.items()}
        features = {metric.title: whole.pop(metric.title) for metric in self.sets}
        if itself:
            self.known[ORIGINAL] = features
        distances = {
            f"{metric.title} to {other}": metric.distance(features[metric.title], known[metric.title])
            for metric in self.sets
            for other, known in self.known.items()
            if not (itself and other == ORIGINAL)
        }
        shape = (kept.seeds, kept.prompts)
        scores = {title: values.reshape(shape) for title, values in whole.items()}
        accuracy = np.concatenate(right).reshape(shape) if right else None
        return Fidelity(
            name, scores.pop("psnr"), scores.pop("ssim"), accuracy, seconds, dict(notes or {}), scores, distances
        )

    def _batch(
        self, positions: Sequence[tuple[int, int]], images: Images, originals: Images, itself: bool
    ) -> dict[str, Floats]:
        """Every number of a batch by its title; of videos, means over frames; and the features of sets."""
        flat, flat_originals = (x.reshape(-1, *x.shape[-3:]) for x in (images, originals))
        frames = len(flat) // len(images)
        texts = [self.texts[prompt] for _, prompt in positions for _ in range(frames)]
        if itself:
            found = {"psnr": np.full(len(flat), built_in.PSNR_CAP), "ssim": np.ones(len(flat))}
        else:
            found = {"psnr": built_in.psnr(flat, flat_originals), "ssim": built_in.ssim(flat, flat_originals)}
        of_videos = {}
        for metric in self.metrics:
            if isinstance(metric, PromptMetric):
                found[metric.title] = metric.score(flat, texts)
            elif isinstance(metric, PairMetric) and not itself:
                found[metric.title] = metric.score(flat, flat_originals)
            elif isinstance(metric, VideoMetric):
                if images.ndim != 5 or images.shape[1] < 2:
                    raise ValueError(
                        f"{metric.label} judges videos, and the model draws images; leave this --metric out"
                    )
                of_videos[metric.title] = metric.score(images)
        means = {title: values.reshape(len(images), frames).mean(1) for title, values in found.items()}
        return means | of_videos | self._features(flat)

    def _features(self, images: Images) -> dict[str, Floats]:
        """Features by the title of a metric of sets; FID and KID share those of one network."""
        known: dict[tuple[object, str], Floats] = {}
        for metric in self.sets:
            key = (type(metric).features, metric.weights)
            if key not in known:
                known[key] = metric.features(images)
        return {metric.title: known[type(metric).features, metric.weights] for metric in self.sets}

    def _real_features(self, folder: Path) -> dict[str, Floats]:
        parts: dict[str, list[Floats]] = {metric.title: [] for metric in self.sets}
        files = folder_of_images(folder)
        self.progress(f"judging {len(files)} real images")
        for path in files:  # one at a time: their sizes differ
            for title, features in self._features(read_image(path)[None]).items():
                parts[title].append(features)
        return {title: np.concatenate(values) for title, values in parts.items()}
