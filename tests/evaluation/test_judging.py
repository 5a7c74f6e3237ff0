"""A variant is judged by every metric, in batches, against the original's images and against real ones."""

import numpy as np
import pytest

from fp4dit_ao.evaluation import judging, metrics
from fp4dit_ao.evaluation.fidelity import Comparison, Evaluation
from fp4dit_ao.evaluation.image_metrics.metric import PairMetric, PromptMetric, SetMetric
from fp4dit_ao.evaluation.judging import Judge
from fp4dit_ao.evaluation.kept_images import KeptImages

RANDOM = np.random.default_rng(0)
TEXTS = ["cat", "a dog", "tree"]


class Length(PromptMetric):
    """Brightness and the prompt's length, so that a mistaken prompt shows."""

    label, digits = "length", 1

    def score(self, images, prompts):
        return images.mean((1, 2, 3)) + np.array([1000.0 * len(prompt) for prompt in prompts])


class Largest(PairMetric):
    label, higher_is_better = "largest", False

    def score(self, images, originals):
        return np.abs(images.astype(float) - originals).max((1, 2, 3))


class Brightness(SetMetric):
    label, seen = "brightness", 0

    def features(self, images):
        type(self).seen += len(images)
        return images.mean((1, 2), dtype=np.float64)

    def distance(self, features, others):
        return float(np.abs(features.mean(0) - others.mean(0)).sum())


class Brighter(Brightness):
    label = "brighter"


def kept(folder, name, images) -> KeptImages:
    found = KeptImages(folder, name, {}, *images.shape[:2])
    for seed in range(images.shape[0]):
        for prompt in range(images.shape[1]):
            found.keep(seed, prompt, images[seed, prompt])
    return found


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_every_number_belongs_to_its_image_and_prompt(batch, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(judging, "BATCH", batch)
    originals = RANDOM.integers(0, 200, (2, 3, 16, 16, 3), dtype=np.uint8)
    images = originals + RANDOM.integers(0, 50, originals.shape, dtype=np.uint8)
    real = RANDOM.integers(0, 256, (1, 5, 9, 7, 3), dtype=np.uint8)
    kept(tmp_path / "real", "real", real)
    judge = Judge(
        first := kept(tmp_path, "original", originals), TEXTS, [Length(), Largest(), Brightness()], tmp_path / "real"
    )
    original, other = judge.judge("original", first, 1.0), judge.judge("w4a6", kept(tmp_path, "other", images), 2.0)
    lengths = np.array([[len(text) for text in TEXTS]] * 2)
    assert other.scores["length"] == pytest.approx(images.mean((2, 3, 4)) + 1000 * lengths)
    assert other.scores["largest"] == pytest.approx((images.astype(int) - originals).max((2, 3, 4)))
    assert other.psnr == pytest.approx(metrics.psnr(images, originals))
    means = [x.reshape(-1, 3).mean(0) for x in (originals, images)]
    assert other.distances["brightness to original"] == pytest.approx(np.abs(means[1] - means[0]).sum())
    truth = real.mean((2, 3)).mean((0, 1))
    assert other.distances["brightness to real images"] == pytest.approx(np.abs(means[1] - truth).sum())
    assert original.identical and "largest" not in original.scores
    assert list(original.distances) == ["brightness to real images"]
    table = Evaluation([original, other], {}, [Comparison.of(other, original)], digits=judge.digits()).markdown()
    difference = next(line for line in table.splitlines() if line.startswith("| w4a6 − original"))
    assert f"{(images.mean((2, 3, 4)) - originals.mean((2, 3, 4))).mean():.2f} (" in difference


def test_metrics_of_one_network_compute_its_features_once(tmp_path) -> None:
    images = RANDOM.integers(0, 256, (1, 3, 16, 16, 3), dtype=np.uint8)
    Brightness.seen = Brighter.seen = 0
    first = kept(tmp_path, "original", images)
    Judge(first, TEXTS, [Brightness(), Brighter()]).judge("original", first, 1.0)
    assert Brightness.seen == 3 and Brighter.seen == 0
