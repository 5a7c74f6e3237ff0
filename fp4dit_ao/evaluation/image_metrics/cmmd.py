"""CMMD: the distance of two sets of images by their CLIP embeddings."""

import numpy as np
import torch

from fp4dit_ao.evaluation.image_metrics.metric import Floats, Images, SetMetric
from fp4dit_ao.evaluation.image_metrics.pretrained import ImageEncoder, array

SIGMA = 10.0
SCALE = 1000.0
_ROWS = 1024
"""Rows of a kernel matrix that are in memory together."""


class Cmmd(SetMetric):
    """Squared maximum mean discrepancy of unit CLIP embeddings, Gaussian kernel of width 10, times 1000.

    arXiv 2401.09603, equation 4, with the authors' constants and, as theirs, pairs of an image with itself included.
    """

    label = "CMMD"
    default_weights = "openai/clip-vit-large-patch14-336"
    digits = 4

    def __init__(self, weights: str | None = None, device: str | torch.device = "cpu"):
        super().__init__(weights, device)
        self.encoder = ImageEncoder(self.weights, self.device)

    def features(self, images: Images) -> Floats:
        return array(torch.nn.functional.normalize(self.encoder(images)))

    def distance(self, features: Floats, others: Floats) -> float:
        within = _mean_kernel(features, features) + _mean_kernel(others, others)
        return SCALE * (within - 2 * _mean_kernel(features, others))


def _mean_kernel(a: Floats, b: Floats) -> float:
    squares = np.square(b).sum(1)
    total = 0.0
    for start in range(0, len(a), _ROWS):
        rows = a[start : start + _ROWS]
        distances = np.square(rows).sum(1)[:, None] + squares[None] - 2 * rows @ b.T
        total += float(np.exp(-distances / (2 * SIGMA**2)).sum())
    return total / (len(a) * len(b))
