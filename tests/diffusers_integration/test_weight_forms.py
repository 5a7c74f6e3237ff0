"""``weights="auto"``: what measured slower than bfloat16 is held in it, in a model that runs in bfloat16."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from fp4dit_ao import MinifloatTensor, load_pipeline
from fp4dit_ao.diffusers_integration import weight_forms
from fp4dit_ao.evaluation.layer_speed import layer_speeds
from fp4dit_ao.evaluation.layer_timing import LayerSpeed
from fp4dit_ao.util.user_cache import VARIABLE
from tests.tiny import CALL

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
    assert weight_forms.keep_fastest(pipe.transformer, torch.device("cpu")) == []
    assert len(wide_is_slow) == asked  # kept


def test_a_model_in_float32_stays_packed_and_nothing_is_measured(folder, wide_is_slow) -> None:
    model = load_pipeline(folder, weights="auto").transformer
    assert model.dtype == torch.float32 and wide_is_slow == []
    assert all(row.weight not in ("bfloat16", "float32") for row in model.summary() if row.quantized)


def test_the_module_form_has_no_graph_to_read_tokens_from(folder) -> None:
    with pytest.raises(ValueError, match="load it with form='graph'"):
        load_pipeline(folder, form="module", weights="auto")
