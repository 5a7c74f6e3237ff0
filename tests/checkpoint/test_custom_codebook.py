"""A codebook that is not built in travels with the checkpoint."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fp4dit_ao import quantize_modules, w4a6
from fp4dit_ao.diffusers_integration.graph_form import load_graph
from fp4dit_ao.diffusers_integration.module_conversion import load_modules
from fp4dit_ao.formats import CODEBOOKS, CodebookFormat, register_codebook
from tests.tiny import tiny_pipeline

LEVELS = (-100, -70, -50, -37, -26, -17, -8, 0, 6, 13, 21, 30, 41, 55, 73, 100)
NAME = "transformer_blocks.0.attn1.to_q.weight"


@pytest.fixture
def saved(tmp_path: Path) -> Iterator[tuple[Path, torch.Tensor]]:
    """A folder, and one of its weights; the process knows the codebook no more."""
    register_codebook(CodebookFormat("travels", LEVELS))
    model: Any = tiny_pipeline(layers=1).transformer
    quantize_modules(model, replace(w4a6(), weight="travels", pre_gelu_weight=None))
    model.save_pretrained(tmp_path / "t")
    weight = model.get_parameter(NAME).dequantize(torch.float32)
    del CODEBOOKS["travels"]
    yield tmp_path / "t", weight
    CODEBOOKS.pop("travels", None)


@pytest.mark.parametrize("form", ["graph", "modules"])
def test_it_is_known_again_after_loading(saved: tuple[Path, torch.Tensor], form: str) -> None:
    folder, weight = saved
    record = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert record["codebooks"] == {"travels": list(LEVELS)}
    loaded: Any = load_graph(folder).graph if form == "graph" else load_modules(folder)
    assert CODEBOOKS["travels"].levels == LEVELS
    assert torch.equal(loaded.get_parameter(NAME).dequantize(torch.float32), weight)


def test_two_codebooks_of_one_name_are_not_mixed_up(saved: tuple[Path, torch.Tensor]) -> None:
    register_codebook(CodebookFormat("travels", (-1, 0)))
    with pytest.raises(ValueError, match="was quantized with a codebook 'travels' that cannot be used here"):
        load_graph(saved[0])
