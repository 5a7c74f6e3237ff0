"""LPIPS with random weights of AlexNet and VGG-16, against torchmetrics' own network."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fp4dit_ao.evaluation.image_metrics.lpips import Lpips, features

RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module", params=["alex", "vgg"])
def weights(request, tmp_path_factory):
    torch.manual_seed(0)
    network = features(request.param)
    folder = tmp_path_factory.mktemp("weights")
    tensors = {f"features.{name}": value for name, value in network.state_dict().items()}
    tensors["classifier.1.weight"] = torch.zeros(2, 2)  # torchvision's file has more than is needed
    torch.save(tensors, folder / "x.pth")
    save_file(tensors, folder / "x.safetensors")
    return request.param, network, folder


def test_it_is_torchmetrics(weights, monkeypatch) -> None:
    from torchmetrics.functional.image import lpips

    backbone, network, folder = weights
    monkeypatch.setattr(lpips, "_get_tv_model_features", lambda net, pretrained: torch.nn.Sequential(*network))
    theirs = lpips._LPIPS(pretrained=True, net=backbone, pnet_rand=True)
    images = RANDOM.integers(0, 256, (3, 64, 72, 3), dtype=np.uint8)
    originals = RANDOM.integers(0, 256, images.shape, dtype=np.uint8)
    pixels = [torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255 for x in (images, originals)]
    wanted = theirs(*pixels, normalize=True).flatten().tolist()
    for file in ("x.pth", "x.safetensors"):
        metric = Lpips(str(folder / file))
        assert metric.title == f"LPIPS ({backbone})"
        assert metric.score(images, originals) == pytest.approx(wanted, rel=1e-4)
    assert metric.score(images, images) == pytest.approx(0, abs=1e-9)


def test_weights_that_are_not_here_are_said_with_the_remedy(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"alexnet-owt-7be5be79.pth, which are not in .*--metric lpips=FILE"):
        Lpips()


def test_weights_in_torchs_cache_are_found(weights, tmp_path, monkeypatch) -> None:
    backbone, _, folder = weights
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub" / "checkpoints"
    place.mkdir(parents=True)
    (place / "alexnet-owt-7be5be79.pth").write_bytes((folder / "x.pth").read_bytes())
    assert Lpips().backbone == backbone


def test_a_file_of_other_objects_is_not_unpickled(tmp_path) -> None:
    torch.save({"x": object()}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        Lpips(str(tmp_path / "x.pth"))
