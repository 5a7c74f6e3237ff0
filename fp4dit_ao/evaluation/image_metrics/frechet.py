"""FID: the distance of two sets of images, their features taken as normally distributed."""

import torch
from torch import Tensor, nn

from fp4dit_ao.evaluation.image_metrics.inception import INCEPTION, feature_encoder
from fp4dit_ao.evaluation.image_metrics.metric import Floats, Images, SetMetric
from fp4dit_ao.evaluation.image_metrics.pretrained import array


class GivenFeatures(nn.Module):
    """Extractor for torchmetrics that takes features in place of images.

    Args:
        num_features: width of the features.
    """

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class FrechetDistance(SetMetric):
    """Fréchet distance ``|m - n|^2 + tr(S + T - 2 (S T)^(1/2))`` of means and covariances (arXiv 1706.08500, equation 6).

    It is called FID with Inception's features alone; the backbone stands beside it. It shrinks as sets grow: compare it
    only between sets of equal sizes, of more images than there are features.
    """

    label = "FID"
    default_weights = INCEPTION
    digits = 2

    def __init__(self, weights: str | None = None, device: str | torch.device = "cpu"):
        super().__init__(weights, device)
        self.encoder = feature_encoder(self.weights, self.device)

    def features(self, images: Images) -> Floats:
        return array(self.encoder(images))

    def distance(self, features: Floats, others: Floats) -> float:
        from torchmetrics.image.fid import FrechetInceptionDistance

        metric = FrechetInceptionDistance(feature=GivenFeatures(features.shape[1]))
        metric.update(torch.from_numpy(others), real=True)
        metric.update(torch.from_numpy(features), real=False)
        return float(metric.compute())
