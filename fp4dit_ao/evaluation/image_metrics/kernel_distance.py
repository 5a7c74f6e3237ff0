"""KID: an unbiased distance of two sets of images, for smaller sets than FID's."""

import torch

from fp4dit_ao.evaluation.image_metrics.frechet import FrechetDistance, GivenFeatures
from fp4dit_ao.evaluation.image_metrics.metric import Floats

SUBSETS, SUBSET_SIZE = 100, 1000
"""Random subsets whose distances are averaged, and most images in each."""


class KernelDistance(FrechetDistance):
    """Squared maximum mean discrepancy with a cubic kernel, times 1000 (arXiv 1801.01401, section 4); about 0 for like sets."""

    label = "KID x 1000"
    digits = 3

    def distance(self, features: Floats, others: Floats) -> float:
        from torchmetrics.image.kid import KernelInceptionDistance

        size = min(SUBSET_SIZE, len(features), len(others))
        metric = KernelInceptionDistance(feature=GivenFeatures(features.shape[1]), subsets=SUBSETS, subset_size=size)
        metric.update(torch.from_numpy(others), real=True)
        metric.update(torch.from_numpy(features), real=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # of the subsets
            mean, _ = metric.compute()
        return 1000 * float(mean)
