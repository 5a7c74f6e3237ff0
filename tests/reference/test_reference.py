"""The reference pipeline is what it says: loadable, small, recognisable, and reproducible from its training script."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import PixArtSigmaPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from fp4dit_ao import reference
from fp4dit_ao.reference import accuracy, data, statistics

MEGABYTES = 60


@pytest.fixture(scope="module")
def pipe() -> Any:
    loaded = PixArtSigmaPipeline.from_pretrained(reference.path())
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_loads_as_any_pixart_sigma_and_draws_64_pixels(pipe: Any) -> None:
    call = reference.generation() | {"num_inference_steps": 1}
    assert pipe("tiger face", **call).images[0].size == (64, 64)


def test_is_small() -> None:
    sizes = [file.stat().st_size for file in reference.path().rglob("*.safetensors")]
    assert len(sizes) == 3
    assert sum(sizes) <= MEGABYTES * 1e6


def test_every_linear_layer_splits_into_groups_of_128(pipe: Any) -> None:
    linears = {name: m for name, m in pipe.transformer.named_modules() if isinstance(m, nn.Linear)}
    assert len(linears) > 50
    assert [name for name, linear in linears.items() if linear.in_features % 128] == []


def test_every_prompt_fits_the_tokenizer_and_is_unlike_every_other(pipe: Any) -> None:
    ids = [tuple(pipe.tokenizer(prompt).input_ids) for prompt in reference.prompts()]
    assert max(map(len, ids)) <= reference.generation()["max_sequence_length"]
    assert len(set(ids)) == len(ids)
    assert not any(pipe.tokenizer.unk_token_id in row for row in ids)


def test_sprite_sheet_round_trip(tmp_path: Path) -> None:
    emoji = data.read_sheet(reference.path())[:23]  # one full row of the sheet and a part of the next
    data.write_sheet(emoji, tmp_path)
    back = data.read_sheet(tmp_path)
    assert [(e.name, e.alias) for e in back] == [(e.name, e.alias) for e in emoji]
    np.testing.assert_array_equal(np.stack([e.image for e in back]), np.stack([e.image for e in emoji]))


def test_real_pictures_are_nearest_to_themselves() -> None:
    assert len(reference.prompts()) == len(reference.pictures()) >= 300
    assert accuracy.prompt_accuracy(reference.pictures(), range(len(reference.prompts()))).all()


def test_nearest_forgives_noise_brightness_and_size() -> None:
    real = reference.pictures()[::10]
    noise = np.random.default_rng(0).normal(0, 0.1, real.shape)
    disturbed = np.clip(0.9 * (real / 255) + noise, 0, 1)
    expected = range(0, len(reference.prompts()), 10)
    assert accuracy.prompt_accuracy(disturbed, expected).all()
    assert accuracy.prompt_accuracy(real.repeat(2, axis=1).repeat(2, axis=2), expected).all()


def test_features_refuse_what_has_no_cells() -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        accuracy.features(np.zeros((1, 60, 64, 3), np.uint8))


def test_accuracy_needs_one_prompt_per_image() -> None:
    with pytest.raises(ValueError, match="found 2 for 3 images"):
        accuracy.prompt_accuracy(reference.pictures()[:3], [0, 1])


def test_generated_pictures_are_the_prompted_ones_whatever_the_batch(pipe: Any) -> None:
    chosen = accuracy.spread_out(12)
    prompts = [reference.prompts()[i] for i in chosen]
    images = np.concatenate(list(accuracy.batches(pipe, prompts, chosen, batch_size=12)))
    assert accuracy.prompt_accuracy(images, chosen).mean() >= 0.5
    alone = next(accuracy.batches(pipe, prompts[3:4], chosen[3:4]))
    assert np.abs(alone[0].astype(int) - images[3]).mean() < 1  # other batch sizes sum in another order


def test_kurtosis_tells_uniform_normal_and_heavy_tails_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    uniform, normal = torch.rand(200_000, generator=generator), torch.randn(200_000, generator=generator)
    assert statistics.excess_kurtosis(uniform) == pytest.approx(-1.2, abs=0.05)
    assert statistics.excess_kurtosis(normal) == pytest.approx(0, abs=0.05)
    assert statistics.excess_kurtosis(normal**3) > 10


def test_weights_are_not_the_uniform_ones_of_an_untrained_model(pipe: Any) -> None:
    for name, module in pipe.transformer.named_modules():
        if isinstance(module, nn.Linear):
            assert statistics.excess_kurtosis(module.weight) > -0.5, name


def test_statistics_name_every_linear_layer(pipe: Any) -> None:
    maxima = statistics.token_maxima(pipe, reference.prompts()[:1], num_inference_steps=1)
    text = statistics.table(pipe.transformer, maxima)
    assert "other" not in text
    assert "| self-attention q, k, v | 18 | 256 → 256 |" in text


# --- the training script --------------------------------------------------------------------------------------------


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads gain nothing at this size, and on a busy machine wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Three emoji, laid out as in the npm package ``emoji-datasource-google``."""
    folder = tmp_path / "package"
    (folder / "img" / "google" / "64").mkdir(parents=True)
    rows = []
    for index, item in enumerate(data.read_sheet(reference.path())[:3]):
        image = f"{index}.png"
        Image.fromarray(item.image).save(folder / "img" / "google" / "64" / image)
        row = {"name": item.name.upper(), "short_name": item.alias.replace(" ", "_"), "category": data.CATEGORIES[0]}
        rows.append(row | {"has_img_google": True, "sort_order": index, "image": image})
    (folder / "emoji.json").write_text(json.dumps(rows))
    return folder


@pytest.mark.usefixtures("one_thread")
def test_a_killed_training_run_resumes_to_the_same_bits(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fp4dit_ao.reference import train, training_run

    monkeypatch.setattr(training_run, "SAVE_EVERY", 2)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train.autoencoder(package, whole, steps=2, batch=2)
    train.autoencoder(package, killed, steps=2, batch=2)
    train.transformer(package, whole, steps=4, batch=2)

    calls = []
    mse_loss: Any = torch.nn.functional.mse_loss

    def killed_in_the_fourth_step(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return mse_loss(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("torch.nn.functional.mse_loss", killed_in_the_fourth_step)
        with pytest.raises(KeyboardInterrupt):
            train.transformer(package, killed, steps=4, batch=2)
    assert (killed / "transformer" / "state-2.safetensors").exists()
    train.transformer(package, killed, steps=4, batch=2)

    for stage, name in (("autoencoder", "state-2.safetensors"), ("transformer", "state-4.safetensors")):
        expected, found = load_file(whole / stage / name), load_file(killed / stage / name)
        assert expected.keys() == found.keys()
        assert [key for key in expected if not torch.equal(expected[key], found[key])] == []

    train.export(package, killed, tmp_path / "out")
    exported = PixArtSigmaPipeline.from_pretrained(tmp_path / "out")
    call = json.loads((tmp_path / "out" / "generation.json").read_text()) | {"num_inference_steps": 1}
    assert exported(reference.prompts()[0], **call).images[0].size == (64, 64)
