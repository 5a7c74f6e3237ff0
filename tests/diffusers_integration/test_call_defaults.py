"""A folder's ``generation.json`` holds for ``pipe(prompt)``, however the pipeline was loaded, and stays with it."""

import copy
import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline, PixArtSigmaPipeline

from fp4dit_ao import load_pipeline, quantize_pipeline
from tests.tiny import CALL, tiny_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float pipeline whose latents are too small for diffusers' resolution binning."""
    path = tmp_path_factory.mktemp("pipe") / "float"
    tiny_pipeline(layers=1).save_pretrained(path)
    (path / "generation.json").write_text(json.dumps(CALL))
    return path


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    return DiffusionPipeline.from_pretrained(folder)


def size(pipe: Any, *args: Any, **call: Any) -> tuple[int, int]:
    found: tuple[int, int] = pipe("a red cat", *args, **call).images[0].size
    return found


def test_without_them_diffusers_cannot_draw() -> None:
    with pytest.raises(ValueError, match="Invalid sample size"):
        size(tiny_pipeline(layers=1))


def test_a_pipeline_is_called_as_any_other(pipe: Any) -> None:
    assert size(pipe) == (32, 32)
    assert size(PixArtSigmaPipeline.from_pretrained(pipe.name_or_path)) == (32, 32)


def test_what_a_call_gives_comes_first(pipe: Any) -> None:
    assert size(pipe, height=64) == (32, 64)
    assert size(pipe, "no dogs", 1) == (32, 32)  # negative prompt and steps, by position
    seen: list[int] = []
    size(pipe, num_inference_steps=3, callback=lambda step, *_: seen.append(step))
    assert seen == [0, 1, 2]


def test_a_quantized_pipeline_is_called_as_any_other_and_so_is_what_was_saved(pipe: Any, tmp_path: Path) -> None:
    quantized = quantize_pipeline(pipe, "w4a6", prompts=["a red cat"], rounding="nearest", progress=False)
    assert size(quantized) == (32, 32)
    quantized.save_pretrained(tmp_path / "q")
    for loaded in (load_pipeline(tmp_path / "q"), DiffusionPipeline.from_pretrained(tmp_path / "q")):
        assert size(loaded) == (32, 32)


def test_they_survive_the_saving_of_a_float_pipeline(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "tuned")
    assert json.loads((tmp_path / "tuned" / "generation.json").read_text()) == CALL
    index = json.loads((tmp_path / "tuned" / "model_index.json").read_text())
    assert index["_class_name"] == "PixArtSigmaPipeline"
    assert size(DiffusionPipeline.from_pretrained(tmp_path / "tuned")) == (32, 32)


def test_the_class_looks_like_diffusers_own(pipe: Any) -> None:
    assert isinstance(pipe, PixArtSigmaPipeline)
    assert (type(pipe).__name__, type(pipe).__module__) == ("PixArtSigmaPipeline", PixArtSigmaPipeline.__module__)
    assert inspect.signature(type(pipe).__call__) == inspect.signature(PixArtSigmaPipeline.__call__)
    assert inspect.signature(type(pipe)) == inspect.signature(PixArtSigmaPipeline)
    assert set(pipe.components) == set(tiny_pipeline(layers=1).components)
    for other in (pickle.loads(pickle.dumps(pipe)), copy.deepcopy(pipe), copy.copy(pipe)):
        assert type(other) is type(pipe) and size(other) == (32, 32)
    assert size(type(pipe)(**pipe.components), **CALL) == (32, 32)


def test_other_folders_are_loaded_as_ever(tmp_path: Path) -> None:
    tiny_pipeline(layers=1).save_pretrained(tmp_path)
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is PixArtSigmaPipeline
