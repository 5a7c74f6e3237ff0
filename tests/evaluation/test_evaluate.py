"""Images and their metrics: what is generated does not depend on batching, and the numbers agree with plain formulas."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from fp4dit_ao.evaluation import metrics
from fp4dit_ao.evaluation.fidelity import Comparison, Evaluation, Fidelity, generate
from fp4dit_ao.util.markdown import markdown_table
from tests.conftest import ROOT
from tests.tiny import CALL, tiny_pipeline

RANDOM = np.random.default_rng(0)


def noisy(images, amount):
    noise = RANDOM.integers(-amount, amount + 1, images.shape)
    return np.clip(images.astype(int) + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def images():
    return RANDOM.integers(0, 256, (2, 5, 32, 32, 3), dtype=np.uint8)


def test_an_image_depends_on_its_own_seed_and_prompt_alone():
    pipe = tiny_pipeline()
    prompts = ["red cat", "blue dog", "tree"]
    together = generate(pipe, prompts, [0, 1], batch_size=4, progress=None, **CALL)
    alone = generate(pipe, prompts, [1], batch_size=1, progress=None, **CALL)
    assert together.shape == (2, 3, 32, 32, 3)
    assert together.dtype == np.uint8
    assert np.abs(together[1].astype(int) - alone[0]).max() <= 1
    assert (together[0] != together[1]).any()


def test_the_pipelines_own_progress_bar_is_as_before():
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(desc="mine")
    generate(pipe, ["cat"], [0], progress=None, **CALL)
    assert pipe._progress_bar_config == {"desc": "mine"}


@pytest.mark.parametrize(("prompts", "seeds", "batch_size"), [([], [0], 1), (["cat"], [], 1), (["cat"], [0], 0)])
def test_nothing_to_generate_is_refused(prompts, seeds, batch_size):
    with pytest.raises(ValueError, match="at least one prompt"):
        generate(None, prompts, seeds, batch_size=batch_size)


def test_an_argument_that_the_pipeline_does_not_take_is_refused():
    with pytest.raises(ValueError, match="takes no argument colour"):
        generate(tiny_pipeline(), ["cat"], [0], colour="red")


def test_psnr_is_the_textbook_formula(images):
    other = noisy(images, 9)
    error = np.square(images.astype(float) - other).mean(axis=(2, 3, 4))
    assert np.allclose(metrics.psnr(other, images), 10 * np.log10(255**2 / error), atol=1e-4)


@pytest.mark.parametrize("colour", [0, 128, 255])
def test_ssim_of_flat_images_is_exact(colour):
    flat = np.full((1, 1, 32, 32, 3), colour, np.uint8)
    assert abs(metrics.ssim(flat, flat) - 1).max() < 1e-6


def test_identical_images_have_capped_psnr_and_full_ssim(images):
    assert (metrics.psnr(images, images) == metrics.PSNR_CAP).all()
    assert np.allclose(metrics.ssim(images, images), 1)
    assert "identical" in Evaluation([Fidelity.of("same", images, images)], {}).markdown()


def test_ssim_falls_with_noise(images):
    a, b = (metrics.ssim(noisy(images, amount), images).mean() for amount in (4, 40))
    assert 1 > a > b > 0


def test_images_of_other_shapes_are_refused(images):
    with pytest.raises(ValueError, match="cannot be compared"):
        metrics.psnr(images, images[:, :4])


def test_intervals_treat_the_seeds_of_a_prompt_as_one_draw():
    by_prompt = RANDOM.normal(size=200)
    once, thrice = by_prompt[None], np.repeat(by_prompt[None], 3, axis=0)
    found, repeated = metrics.estimate(once), metrics.estimate(thrice)
    assert np.allclose([found.value, found.low, found.high], [repeated.value, repeated.low, repeated.high])
    half = 1.96 * by_prompt.std() / np.sqrt(200)
    assert found.low == pytest.approx(found.value - half, abs=0.03)
    assert found.high == pytest.approx(found.value + half, abs=0.03)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    hits = 0
    for _ in range(200):
        prompt = RANDOM.normal(size=(1, 60))
        found = metrics.estimate(prompt + RANDOM.normal(size=(3, 60)))
        hits += found.low <= 0 <= found.high
    assert 175 <= hits <= 199


def test_a_proportion_of_one_is_not_certain():
    found = metrics.estimate(np.ones((3, 50), dtype=bool))
    assert found.value == 1
    assert found.high == pytest.approx(1)
    assert 0.9 < found.low < 0.95


def test_a_proportion_of_zero_has_the_published_interval():
    found = metrics.estimate(np.zeros((3, 20), dtype=bool))
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3: 0 of 20
    assert (found.low, found.high) == (pytest.approx(0, abs=5e-5), pytest.approx(0.1611, abs=5e-5))


def test_one_prompt_has_no_interval():
    found = metrics.estimate(np.array([[1.0], [3.0]]))
    assert (found.value, found.low, found.high) == (2, 2, 2)


def test_published_intervals_are_reproduced():
    published = json.loads((ROOT / "benchmarks" / "results" / "quality.json").read_text())
    for row in published["variants"]:
        for name, estimate in Fidelity.from_dict(row).estimates().items():
            for end, value in asdict(estimate).items():
                assert value == pytest.approx(row["estimates"][name][end], abs=1e-6), (row["name"], name, end)


def test_a_paired_difference_is_narrower_than_its_parts(images):
    worse = noisy(images, 12)
    a, b = Fidelity.of("a", worse, images), Fidelity.of("b", noisy(worse, 1), images)
    pair = Comparison.of(a, b)
    assert pair.psnr.value == pytest.approx(a.psnr.mean() - b.psnr.mean())
    assert pair.psnr.low > 0


def test_what_is_written_is_read_back(images, tmp_path):
    fidelity = Fidelity.of("x", noisy(images, 3), images, seconds=0.5, notes={"bits": "4"})
    again = Fidelity.from_dict(json.loads(json.dumps(fidelity.to_dict())))
    assert np.allclose(again.psnr, fidelity.psnr, atol=1e-4)
    assert (again.name, again.seconds, again.notes, again.right) == ("x", 0.5, {"bits": "4"}, None)
    evaluation = Evaluation([fidelity], {"prompts": 5})
    evaluation.save(tmp_path / "deep" / "e.json")
    data = json.loads((tmp_path / "deep" / "e.json").read_text())
    assert data["settings"] == {"prompts": 5}
    assert {"processor", "torch", "torchao"} <= set(data["environment"])
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["e.json"]


def test_prompt_accuracy_is_judged_per_image():
    from fp4dit_ao import reference

    real = reference.pictures()[[3, 4]]
    swapped = np.stack([real, real[::-1]])
    fidelity = Fidelity.of("x", swapped, swapped, prompt_indices=[3, 4])
    assert fidelity.right is not None
    assert fidelity.right.tolist() == [[True, True], [False, False]]
    assert "50.0 %" in Evaluation([fidelity], {}).markdown()


def test_a_markdown_table_lines_up():
    assert markdown_table(["a", "bb"], [["1", "2"]]).splitlines() == ["| a   | bb  |", "|-----|-----|", "| 1   | 2   |"]
