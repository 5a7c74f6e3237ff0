"""Metrics by networks of transformers: tiny random weights through the real classes, against an independent computation."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fp4dit_ao.evaluation.image_metrics import METRICS, open_metrics
from fp4dit_ao.evaluation.image_metrics.clip_score import ClipScore
from fp4dit_ao.evaluation.image_metrics.cmmd import Cmmd
from fp4dit_ao.evaluation.image_metrics.dino import DinoSimilarity
from fp4dit_ao.evaluation.image_metrics.frechet import FrechetDistance
from tests.evaluation.tiny_judges import tiny_clip, tiny_dino

RANDOM = np.random.default_rng(0)
PROMPTS = ["a red cat", "a blue dog", "tree"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("weights") / "tiny-clip")


@pytest.fixture(scope="module")
def dino(tmp_path_factory) -> Path:
    return tiny_dino(tmp_path_factory.mktemp("weights") / "tiny-dino")


@pytest.fixture(scope="module")
def images():
    return RANDOM.integers(0, 256, (3, 40, 56, 3), dtype=np.uint8)


def test_clip_score_is_torchmetrics(clip, images) -> None:
    from torchmetrics.functional.multimodal import clip_score
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(clip)

    class AsBefore5:
        """torchmetrics 1.9 expects tensors, which transformers 4 returned."""

        config = model.config

        def to(self, device):
            return self

        def get_image_features(self, pixels):
            return model.visual_projection(model.vision_model(pixels).pooler_output)

        def get_text_features(self, ids, mask):
            return model.text_projection(model.text_model(ids, attention_mask=mask).pooler_output)

    processor = CLIPProcessor(CLIPImageProcessorPil.from_pretrained(clip), AutoTokenizer.from_pretrained(clip))
    pixels = [torch.from_numpy(image).permute(2, 0, 1) for image in images]
    with torch.no_grad():
        wanted = [
            float(clip_score(image, text, lambda: (AsBefore5(), processor)))
            for image, text in zip(pixels, PROMPTS, strict=True)
        ]
    found = ClipScore(str(clip)).score(images, PROMPTS)
    assert found.clip(0) == pytest.approx(wanted, abs=1e-4)  # torchmetrics shows no negative mean
    assert max(wanted) > 0
    assert len(set(found.round(3))) == 3


def test_a_long_prompt_is_cut_and_keeps_its_end(clip, images) -> None:
    metric = ClipScore(str(clip))
    long = "red " * 14
    assert metric.score(images[:1], [long]) == pytest.approx(metric.score(images[:1], [long * 9]))


def test_dino_is_the_cosine_of_class_tokens(dino, images) -> None:
    from transformers import BitImageProcessorPil, Dinov2Model

    others = RANDOM.integers(0, 256, images.shape, dtype=np.uint8)
    model, processor = Dinov2Model.from_pretrained(dino).eval(), BitImageProcessorPil.from_pretrained(dino)
    wanted = []
    for pair in zip(images, others, strict=True):
        with torch.no_grad():
            a, b = (model(**processor(image, return_tensors="pt")).last_hidden_state[0, 0].double() for image in pair)
        wanted.append(float(a @ b / (a.norm() * b.norm())))
    metric = DinoSimilarity(str(dino))
    assert metric.score(images, others) == pytest.approx(wanted, abs=1e-5)
    assert metric.score(images, images) == pytest.approx(1, abs=1e-6)


def test_sets_are_compared_by_any_network_and_the_table_says_which(clip, dino, images) -> None:
    fid, cmmd = FrechetDistance(str(dino)), Cmmd(str(clip))
    assert (fid.title, cmmd.title) == ("FID (tiny-dino)", "CMMD (tiny-clip)")
    assert fid.features(images).shape == (3, 32)
    embeddings = cmmd.features(images)
    assert embeddings.shape == (3, 24)
    assert np.linalg.norm(embeddings, axis=1) == pytest.approx(1)
    assert cmmd.distance(embeddings, embeddings) == pytest.approx(0, abs=1e-9)


def test_a_network_that_is_not_here_is_said_with_the_remedy(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for weights in ("owner/no-such-model", str(tmp_path)):
        with pytest.raises(OSError, match="give their folder: --metric NAME=FOLDER"):
            ClipScore(weights)


def test_what_is_here_is_not_asked_of_the_hub(clip, monkeypatch) -> None:
    """A folder is opened with every connection refused."""
    import socket

    def refuse(*_: object) -> None:
        raise AssertionError("connected")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    ClipScore(str(clip))


def test_inception_without_its_packages_names_the_extra(monkeypatch) -> None:
    from torchmetrics.image import fid

    def missing(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("no torch_fidelity")

    monkeypatch.setattr(fid, "NoTrainInceptionV3", missing)
    with pytest.raises(RuntimeError, match=r"pip install 'fp4dit-ao\[fid\]'.*--metric fid="):
        open_metrics(["fid"], "cpu")


def test_inception_sees_pixels_in_torch_order(monkeypatch, images) -> None:
    from torchmetrics.image import fid

    seen = []

    def network(**options: object) -> object:
        seen.append(options)
        return SimpleNamespace(to=lambda device: lambda pixels: pixels.double().mean((2, 3)))

    monkeypatch.setattr(fid, "NoTrainInceptionV3", network)
    metric = FrechetDistance()
    assert metric.features(images) == pytest.approx(images.mean((1, 2)))
    assert metric.title == "FID (inception)"
    assert seen[0]["name"] == "inception-v3-compat" and seen[0]["features_list"] == ["2048"]


def test_names_that_are_unknown_or_given_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown metric 'clop'; choose one of clip, dino"):
        open_metrics(["clop"], "cpu")
    with pytest.raises(ValueError, match="dino=x is given twice"):
        open_metrics(["dino=x", "dino=x"], "cpu")


def test_two_networks_of_one_name_are_refused(dino, tmp_path) -> None:
    other = tmp_path / Path(dino).name
    shutil.copytree(dino, other)
    with pytest.raises(ValueError, match=r"would both be called DINO \(.*\); leave one out, or give one of"):
        open_metrics([f"dino={dino}", f"dino={other}"], "cpu")


def test_every_metric_says_its_source_and_what_it_needs() -> None:
    assert all(info.source and info.cost and info.summary for info in METRICS.infos())
