"""LPIPS: how different an image looks from its original."""

import importlib.resources
from pathlib import Path

import torch
from torch import Tensor, nn

from fp4dit_ao.evaluation.image_metrics.metric import Floats, Images, PairMetric
from fp4dit_ao.evaluation.image_metrics.pretrained import array
from fp4dit_ao.evaluation.image_metrics.weight_files import load_all, read_weights

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Mean and spread of ImageNet's pixels in [-1, 1], by which the authors normalise."""
TAPS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}
"""Positions in torchvision's ``features`` whose outputs are compared, by the authors' name of the backbone."""


class Lpips(PairMetric):
    """Squared differences of normalised features of five layers, weighted as people see them (arXiv 1801.03924, equation 1).

    The backbone is AlexNet or VGG-16, whichever the weights are of: torchvision's file, which needs no torchvision. The
    authors' linear layers come with torchmetrics. Images keep their size.
    """

    label = "LPIPS"
    default_weights = "alexnet-owt-7be5be79.pth"
    higher_is_better = False

    def __init__(self, weights: str | None = None, device: str | torch.device = "cpu"):
        super().__init__(weights, device)
        path = _file(self.weights)
        tensors = read_weights(path)
        self.backbone = "alex" if tensors["features.0.weight"].shape[-1] == 11 else "vgg"
        self.features = features(self.backbone)
        load_all(self.features, {name.removeprefix("features."): value for name, value in tensors.items()}, path)
        self.features.eval().to(self.device)
        self.linear = [head.to(self.device) for head in _heads(self.backbone)]

    @torch.no_grad()
    def score(self, images: Images, originals: Images) -> Floats:
        total = torch.zeros(len(images), device=self.device)
        for head, ours, theirs in zip(self.linear, self._layers(images), self._layers(originals), strict=True):
            total += nn.functional.conv2d((ours - theirs) ** 2, head).mean((1, 2, 3))
        return array(total)

    def _layers(self, images: Images) -> list[Tensor]:
        x = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        shift, scale = (torch.tensor(values, device=self.device)[:, None, None] for values in (SHIFT, SCALE))
        x = (x - shift) / scale
        found = []
        for position, layer in enumerate(self.features):
            x = layer(x)
            if position in TAPS[self.backbone]:
                found.append(x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt())
        return found


def features(backbone: str) -> nn.Sequential:
    """Convolutions of AlexNet or VGG-16 up to the last that is compared, numbered as torchvision numbers them."""
    if backbone == "alex":
        return nn.Sequential(
            nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, 1, 1), nn.ReLU(), nn.Conv2d(384, 256, 3, 1, 1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU(),
        )  # fmt: skip
    found: list[nn.Module] = []
    channels = 3
    for block, width in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
        found += [nn.MaxPool2d(2, 2)] if found else []
        for _ in range(block):
            found += [nn.Conv2d(channels, width, 3, 1, 1), nn.ReLU()]
            channels = width
    return nn.Sequential(*found)


def _heads(backbone: str) -> list[Tensor]:
    """The authors' weights of the squared differences, ``(1, channels, 1, 1)`` for each layer."""
    file = importlib.resources.files("torchmetrics.functional.image") / "lpips_models" / f"{backbone}.pth"
    with importlib.resources.as_file(file) as path:
        tensors = read_weights(path)
    return [tensors[f"lin{layer}.model.1.weight"] for layer in range(5)]


def _file(name: str) -> Path:
    """A file by its path, or by its name in the folder where torchvision keeps its weights.

    Raises:
        FileNotFoundError: it is in neither place.
    """
    cached = Path(torch.hub.get_dir()) / "checkpoints" / name
    found = next((path for path in (Path(name).expanduser(), cached) if path.is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"LPIPS needs torchvision's weights {name}, which are not in {cached.parent}: "
            "torchvision.models.alexnet(weights='DEFAULT') fetches them; or give a file: --metric lpips=FILE"
        )
    return found
