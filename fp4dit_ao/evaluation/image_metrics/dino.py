"""DINO similarity: whether an image shows what the original shows."""

import torch

from fp4dit_ao.evaluation.image_metrics.metric import Floats, Images, PairMetric
from fp4dit_ao.evaluation.image_metrics.pretrained import ImageEncoder, array


class DinoSimilarity(PairMetric):
    """Cosine of the class tokens of an image and its original (DreamBooth's DINO metric, arXiv 2208.12242, section 4)."""

    label = "DINO"
    default_weights = "facebook/dinov2-base"

    def __init__(self, weights: str | None = None, device: str | torch.device = "cpu"):
        super().__init__(weights, device)
        self.encoder = ImageEncoder(self.weights, self.device)

    def score(self, images: Images, originals: Images) -> Floats:
        return array(torch.nn.functional.cosine_similarity(self.encoder(images), self.encoder(originals)))
