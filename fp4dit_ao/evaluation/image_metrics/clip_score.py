"""CLIP score: how well an image fits its prompt."""

from collections.abc import Sequence

import torch

from fp4dit_ao.evaluation.image_metrics.metric import Floats, Images, PromptMetric
from fp4dit_ao.evaluation.image_metrics.pretrained import TextImageEncoder, array


class ClipScore(PromptMetric):
    """100 times the cosine of an image's and its prompt's CLIP embedding (arXiv 2104.08718, with torchmetrics' factor)."""

    label = "CLIP score"
    default_weights = "openai/clip-vit-large-patch14"
    digits = 2

    def __init__(self, weights: str | None = None, device: str | torch.device = "cpu"):
        super().__init__(weights, device)
        self.encoder = TextImageEncoder(self.weights, self.device)

    def score(self, images: Images, prompts: Sequence[str]) -> Floats:
        return array(100 * self.encoder.cosines(images, prompts))
