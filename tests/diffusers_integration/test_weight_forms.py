"""``weights="auto"``: what measured slower than bfloat16 is held in it, in a model that runs in bfloat16."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from fp4dit_ao import MinifloatTensor, load_pipeline, quantize_pipeline, unpack_weights
from fp4dit_ao.diffusers_integration import weight_forms
from fp4dit_ao.diffusers_integration.graph_form import load_graph
from fp4dit_ao.evaluation.layer_speed import layer_speeds
from fp4dit_ao.evaluation.layer_timing import LayerSpeed
from fp4dit_ao.graph_capture import sample_description
from fp4dit_ao.tensors.levels import LevelTensor
from fp4dit_ao.util.user_cache import VARIABLE
from tests.tiny import CALL, tiny_pipeline

WIDE = (512, 128)
"""Shape of the first linear of the tiny model's feed-forward."""


@pytest.fixture(scope="module")
def folder(tiny_quantized: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("forms")
    tiny_quantized.save_pretrained(place / "q")
    return place / "q"


@pytest.fixture
def wide_is_slow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[int, ...]]:
    """Every linear is twice as fast as bfloat16, but for the wide one, which is half as fast; returns what is measured."""
    asked = []

    def measurer(groups, rows, device, seconds) -> LayerSpeed:
        shape = tuple(groups[0][0].shape)
        asked.append((*shape, rows))
        speed = 0.5 if shape == WIDE else 2.0
        return LayerSpeed(1.0, speed, speed)

    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(weight_forms, "layer_speeds", functools.partial(layer_speeds, measurer=measurer))
    return asked


def test_the_slow_layer_alone_is_in_bfloat16(folder, wide_is_slow, tiny_quantized, tmp_path) -> None:
    pipe = load_pipeline(folder, dtype=torch.bfloat16, weights="auto")
    pipe.set_progress_bar_config(disable=True)
    weights = {name: p.detach() for name, p in pipe.transformer.graph.named_parameters()}
    for name, p in tiny_quantized.transformer.graph.named_parameters():
        before, found = p.detach(), weights[name]
        if isinstance(before, MinifloatTensor):
            assert type(found) is (torch.Tensor if tuple(before.shape) == WIDE else MinifloatTensor), name
            values = found.dequantize() if isinstance(found, MinifloatTensor) else found
            assert torch.equal(values, before.dequantize(torch.bfloat16)), name
    rows = {row.name: row for row in pipe.transformer.summary()}
    wide = rows["transformer_blocks.0.ff.net.0.proj"]
    assert (wide.weight, wide.quantized, wide.bytes) == ("bfloat16", False, 2 * 512 * 128)
    assert wide.reason.startswith("unpacked from ")
    assert (*WIDE, 32) in wide_is_slow  # two images of 8 x 8 latents, in patches of 2 x 2
    pipe("a cat", **CALL)
    for refused in (lambda: pipe.save_pretrained(tmp_path / "no"), pipe.transformer.to_modules, pipe.transformer.float):
        with pytest.raises(ValueError, match="needs packed weights, and these were unpacked"):
            refused()
    asked = len(wide_is_slow)
    assert weight_forms.keep_fastest(pipe.transformer, torch.device("cpu")) == {}
    assert len(wide_is_slow) == asked  # kept


def test_with_memory_bytes_are_a_form_too(folder, monkeypatch, tmp_path) -> None:
    """As on a GPU: times of bytes are measured like those of packed codes, and taken where they are shorter and fit."""
    asked: list[str] = []

    def measurer(groups, rows, device, seconds) -> LayerSpeed:
        weight = groups[0][0]
        asked.append(f"{type(weight).__name__} {len(groups[0])} {tuple(weight.shape)}")
        speed = {"MinifloatTensor": 1.0, "LevelTensor": 0.5 if tuple(weight.shape) == WIDE else 2.0}
        return LayerSpeed(1.0 / speed[type(weight).__name__], 1.0, speed[type(weight).__name__])

    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(weight_forms, "layer_speeds", functools.partial(layer_speeds, measurer=measurer))
    transformer = load_graph(folder / "transformer").to(torch.bfloat16)
    packed = weight_forms.low_bit_weights(transformer)
    assert weight_forms.keep_fastest(transformer, torch.device("cpu"), memory=0) == {}
    chosen = weight_forms.keep_fastest(transformer, torch.device("cpu"), memory=10**9)
    wide = {name for name, weight in packed.items() if tuple(weight.shape) == WIDE}
    assert chosen == dict.fromkeys(packed.keys() - wide, "int8")
    now = weight_forms.low_bit_weights(transformer)
    assert all(isinstance(now[name], LevelTensor if name in chosen else MinifloatTensor) for name in packed)
    assert all(torch.equal(now[name].dequantize(), packed[name].dequantize()) for name in packed)
    assert len(asked) == len(set(asked)), "each kind is measured once"
    assert any(text.startswith("LevelTensor 3") for text in asked), "q, k and v together"


@torch.no_grad()
def test_a_graph_that_runs_joined_knows_when_its_weights_are_unpacked_or_moved(folder, monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda body, **options: body)
    transformer = load_graph(folder / "transformer")
    given = {
        name: (x.normal_() if x.is_floating_point() else torch.ones_like(x)) if isinstance(x, torch.Tensor) else x
        for name, x in sample_description.empty_like(transformer.description).items()
    }

    def held() -> set[type]:
        call = given | {"return_dict": False}
        assert torch.equal(transformer(**call)[0], transformer.graph(**call)[0])
        names = dict(transformer._run.run.named_parameters())
        assert any(name.endswith("to_q.joined_weight") for name in names)
        return {type(x.detach()) for name, x in names.items() if name.endswith("joined_weight")}

    transformer.compile_graph()
    assert held() == {MinifloatTensor}
    before = transformer._run
    transformer.to("cpu")
    transformer(**given)
    assert transformer._run is before
    unpack_weights(transformer, "int8")
    assert held() == {LevelTensor}


@pytest.mark.parametrize("recipe", ["w4a6", "w4a6_codebook", "int_w4a8"])
def test_a_graph_that_runs_joined_is_saved_as_before(recipe, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda body, **options: body)
    how: Any = {"prompts": ["a red cat"], "rounding": "nearest", "progress": False, **CALL}
    pipe: Any = quantize_pipeline(tiny_pipeline(layers=1), recipe, **how)
    pipe.save_pretrained(tmp_path / "apart")
    pipe.transformer.compile_graph()
    pipe("a red cat", output_type="latent", **CALL)
    assert any(name.endswith("joined_weight") for name, _ in pipe.transformer._run.run.named_parameters())
    pipe.save_pretrained(tmp_path / "joined")
    apart, joined = ((tmp_path / name / "transformer") for name in ("apart", "joined"))
    for file in (path.name for path in apart.iterdir()):
        assert (apart / file).read_bytes() == (joined / file).read_bytes(), file


def test_memory_is_left_for_what_is_not_there_yet() -> None:
    assert weight_forms.free_for_weights(80_000, 40_000) == 10_000
    assert weight_forms.free_for_weights(10, 20) == 0


def test_a_busy_machine_decides_nothing() -> None:
    weights: Any = {"fc": torch.empty(4, 8)}
    busy, steady = LayerSpeed(1.0, 2.0, 0.5, False), LayerSpeed(1.0, 2.0, 0.5)
    assert weight_forms.forms(weights, {"fc": busy}, {}) == {}
    names = [form.name for form in weight_forms.forms(weights, {"fc": steady}, {"fc": ("int8", busy)})["fc"]]
    assert names == ["packed", "bfloat16"]


def test_a_model_in_float32_stays_packed_and_nothing_is_measured(folder, wide_is_slow) -> None:
    model = load_pipeline(folder, weights="auto").transformer
    assert model.dtype == torch.float32 and wide_is_slow == []
    assert all(row.weight not in ("bfloat16", "float32") for row in model.summary() if row.quantized)


def test_the_module_form_has_no_graph_to_read_tokens_from(folder) -> None:
    with pytest.raises(ValueError, match="load it with form='graph'"):
        load_pipeline(folder, form="module", weights="auto")
