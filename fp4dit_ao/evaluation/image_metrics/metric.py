"""The contract of image metrics: one class a metric, in three kinds."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Images = NDArray[np.uint8]


class ImageMetric(ABC):
    """A judgement of images: a :class:`PromptMetric`, :class:`PairMetric`, :class:`SetMetric` or :class:`VideoMetric`.

    Of videos, the first three judge every frame; a video's number is the mean of its frames'.

    Args:
        weights: folder, file or hub id of the network that judges; :attr:`default_weights` if None.
        device: where it runs.

    Attributes:
        label: name in tables.
        default_weights: hub id, or name of a file, of the network in the metric's paper; ``""`` if it needs none.
        higher_is_better: whether a larger value is a better one.
        digits: after the point, in tables.
        backbone: what judged, for tables; the last part of ``weights`` unless a metric knows better.
    """

    label: ClassVar[str]
    default_weights: ClassVar[str] = ""
    higher_is_better: ClassVar[bool] = True
    digits: ClassVar[int] = 3

    def __init__(self, weights: str | None = None, device: str | torch.device = "cpu"):
        self.weights = weights or self.default_weights
        self.device = torch.device(device)
        self.backbone = Path(self.weights).name

    @property
    def title(self) -> str:
        """Heading of a column: the label, and the backbone in parentheses."""
        return f"{self.label} ({self.backbone})" if self.backbone else self.label


class PromptMetric(ImageMetric):
    """How well each image shows its prompt, or pleases."""

    @abstractmethod
    def score(self, images: Images, prompts: Sequence[str]) -> Floats:
        """One number for each image.

        Args:
            images: uint8 ``(n, h, w, 3)``.
            prompts: ``n`` texts.
        """


class PairMetric(ImageMetric):
    """How close each image is to the original's of the same prompt and seed."""

    @abstractmethod
    def score(self, images: Images, originals: Images) -> Floats:
        """One number for each image; both arguments uint8 ``(n, h, w, 3)``."""


class VideoMetric(ImageMetric):
    """A property of a video by itself."""

    @abstractmethod
    def score(self, videos: Images) -> Floats:
        """One number for each video of uint8 ``(n, frames, h, w, 3)``, with two frames or more."""


class SetMetric(ImageMetric):
    """A distance between two sets of images, in any order and of any two sizes."""

    higher_is_better = False

    @abstractmethod
    def features(self, images: Images) -> Floats:
        """Features ``(n, width)`` of images uint8 ``(n, h, w, 3)``."""

    @abstractmethod
    def distance(self, features: Floats, others: Floats) -> float:
        """Distance of two sets by their features, ``(n, width)`` and ``(m, width)``."""
