"""Features of the Inception network that FID was defined with."""

import functools
from pathlib import Path

import torch
from torch import Tensor

from fp4dit_ao.evaluation.image_metrics.metric import Images
from fp4dit_ao.evaluation.image_metrics.pretrained import ImageEncoder

INCEPTION = "inception"
"""Name that stands for weights: torch-fidelity's port of the original Inception, with its own copy of the weights."""


class InceptionEncoder:
    """2048 features by torch-fidelity's ``inception-v3-compat``, which resizes to 299 pixels as TensorFlow did.

    Args:
        weights: file ``pt_inception-2015-12-05-6726825d.pth``; None for torch-fidelity's cache.
        device: where it runs.

    Raises:
        RuntimeError: torch-fidelity or torchvision is missing.
    """

    def __init__(self, weights: Path | None, device: torch.device):
        try:
            from torchmetrics.image import fid  # imports torch-fidelity, and that torchvision

            self.network = fid.NoTrainInceptionV3(
                name="inception-v3-compat",
                features_list=["2048"],
                feature_extractor_weights_path=None if weights is None else str(weights),
            ).to(device)
        except (ModuleNotFoundError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "torchvision" not in str(error):
                raise
            raise RuntimeError(
                "the Inception features of FID and KID need torch-fidelity and torchvision: pip install 'fp4dit-ao[fid]'; "
                "or give an image model of transformers, whose name the table then says: --metric fid=facebook/dinov2-base"
            ) from error
        self.device = device

    @torch.no_grad()
    def __call__(self, images: Images) -> Tensor:
        """Features ``(n, 2048)`` of images uint8 ``(n, h, w, 3)``."""
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(self.device)
        features: Tensor = self.network(pixels)
        return features


@functools.lru_cache(maxsize=1)  # FID and KID share one
def feature_encoder(weights: str, device: torch.device) -> InceptionEncoder | ImageEncoder:
    """Inception for ``"inception"`` or a ``.pth`` file, else the model of transformers with that name."""
    if weights == INCEPTION:
        return InceptionEncoder(None, device)
    path = Path(weights).expanduser()
    return InceptionEncoder(path, device) if path.is_file() else ImageEncoder(weights, device)
