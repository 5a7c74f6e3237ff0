"""The dimensions of VBench that need no other network than those of images: flicker, and whether the content stays."""

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from fp4dit_ao.evaluation.image_metrics.metric import Floats, Images, VideoMetric
from fp4dit_ao.evaluation.image_metrics.pretrained import ImageEncoder, array


class TemporalFlicker(VideoMetric):
    """``(255 - mean |frame - next frame|) / 255`` in percent: VBench's temporal flickering, 100 for a still video.

    arXiv 2311.17982, section 3.1. It also falls with motion: compare it with the original's.
    """

    label = "temporal flickering, %"
    digits = 2

    def score(self, videos: Images) -> Floats:
        steps = np.abs(np.diff(videos.astype(np.int16), axis=1)).mean(axis=(1, 2, 3, 4))
        return 100 * (255 - steps.astype(np.float64)) / 255


class SubjectConsistency(VideoMetric):
    """Mean over frames of the cosine with the first frame and with the one before, in percent: VBench's subject consistency.

    arXiv 2311.17982, section 3.1, with DINO's class tokens; by CLIP's embeddings it is VBench's background consistency.
    """

    label = "subject consistency, %"
    default_weights = "facebook/dino-vitb16"
    digits = 2

    def __init__(self, weights: str | None = None, device: str | torch.device = "cpu"):
        super().__init__(weights, device)
        self.encoder = ImageEncoder(self.weights, self.device)

    def score(self, videos: Images) -> Floats:
        found = []
        for video in videos:
            features = self.encoder(video)
            first = cosine_similarity(features[1:], features[:1]).clamp(min=0)
            before = cosine_similarity(features[1:], features[:-1]).clamp(min=0)
            found.append(100 * array((first + before) / 2).mean())
        return np.array(found)


class BackgroundConsistency(SubjectConsistency):
    """:class:`SubjectConsistency` by CLIP, which sees the scene rather than the object: VBench's background consistency."""

    label = "background consistency, %"
    default_weights = "openai/clip-vit-base-patch32"
