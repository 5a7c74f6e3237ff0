"""Videos: kept without loss, judged frame by frame and as VBench does."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fp4dit_ao.evaluation import metrics
from fp4dit_ao.evaluation.drawing import draw_missing
from fp4dit_ao.evaluation.fidelity import Evaluation
from fp4dit_ao.evaluation.image_metrics.dino import DinoSimilarity
from fp4dit_ao.evaluation.image_metrics.video import SubjectConsistency, TemporalFlicker
from fp4dit_ao.evaluation.judging import Judge
from fp4dit_ao.evaluation.kept_images import KeptImages
from fp4dit_ao.evaluation.prompt_sets import Prompt
from fp4dit_ao.evaluation.report import write_report
from fp4dit_ao.evaluation.seeding import seeding
from tests.evaluation.tiny_judges import tiny_dino

PROMPTS = [Prompt("red cat", "0"), Prompt("blue dog", "1")]


class Painter:
    """A pipeline of videos, as diffusers' are: ``frames`` in place of ``images``."""

    def __init__(self, shift: float = 0.0):
        self.shift = shift

    def __call__(self, prompts, generator, output_type="np", **call):
        videos = [np.random.default_rng(one.initial_seed()).random((4, 24, 16, 3)) for one in generator]
        return SimpleNamespace(frames=np.clip(np.stack(videos) + self.shift, 0, 1))

    def set_progress_bar_config(self, **options: object) -> None:
        pass


def drawn(folder, name, shift=0.0) -> KeptImages:
    kept = KeptImages(folder, name, {}, 1, len(PROMPTS))
    draw_missing(Painter(shift), kept, PROMPTS, [0], seeding("distinct"), batch_size=2)
    return kept


@pytest.mark.parametrize("repeated", [(), (1,), (1, 2, 3), (3,)])
def test_a_video_comes_back_bit_for_bit(repeated, tmp_path) -> None:
    """Equal frames that follow each other, which PNG joins, too."""
    video = np.random.default_rng(0).integers(0, 256, (4, 24, 16, 3), dtype=np.uint8)
    for frame in repeated:
        video[frame] = video[frame - 1]
    kept = KeptImages(tmp_path, "x", {}, 1, 1)
    kept.keep(0, 0, video)
    assert np.array_equal(kept.read(0, 0), video)


def test_frames_are_judged_one_by_one_and_a_video_is_their_mean(tmp_path) -> None:
    original, other = drawn(tmp_path, "original"), drawn(tmp_path, "other", 0.1)
    dino = DinoSimilarity(str(tiny_dino(tmp_path / "tiny-dino")))
    judge = Judge(original, [prompt.text for prompt in PROMPTS], [dino, TemporalFlicker()])
    rows = [judge.judge(kept.folder.name, kept, 1.0) for kept in (original, other)]
    assert rows[0].identical and rows[1].psnr.shape == (1, 2)
    a, b = other.read(0, 1), original.read(0, 1)
    assert rows[1].psnr[0, 1] == pytest.approx(metrics.psnr(a, b).mean())
    assert rows[1].scores[dino.title][0, 1] == pytest.approx(dino.score(a, b).mean(), abs=1e-6)
    assert rows[1].scores["temporal flickering, %"][0, 1] == pytest.approx(TemporalFlicker().score(a[None])[0])
    write_report(tmp_path / "v.html", Evaluation(rows, {}), [original, other], ["red cat", "blue dog"], [0], {})
    assert "data:image/webp" in (tmp_path / "v.html").read_text()


def test_flicker_by_hand() -> None:
    video = np.zeros((1, 3, 2, 2, 3), np.uint8)
    video[0, 1] = 51  # up by a fifth and down again
    assert TemporalFlicker().score(video) == pytest.approx([80])
    assert TemporalFlicker().score(np.zeros_like(video)) == pytest.approx([100])


def test_consistency_is_its_formula() -> None:
    features = np.array([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
    metric = SubjectConsistency.__new__(SubjectConsistency)
    metric.encoder = lambda video: torch.from_numpy(features)
    # frame 1: 0.6 and 0.6; frame 2: -1 and -0.6, which count as 0
    assert metric.score(np.zeros((1, 3, 2, 2, 3), np.uint8)) == pytest.approx([100 * (0.6 + 0) / 2])


def test_metrics_of_videos_refuse_images(tmp_path) -> None:
    kept = KeptImages(tmp_path, "x", {}, 1, 1)
    kept.keep(0, 0, np.zeros((24, 16, 3), np.uint8))
    with pytest.raises(ValueError, match="temporal flickering, % judges videos, and the model draws images"):
        Judge(kept, ["cat"], [TemporalFlicker()]).judge("x", kept, 1.0)
