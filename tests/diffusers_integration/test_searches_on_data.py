"""Weights searched by their inputs: calibrated, stored like any others, and refused where there is no data."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fp4dit_ao import quantize_modules, quantize_pipeline, w4a6_codebook
from fp4dit_ao.checkpoint.graph_tensors import state_of
from fp4dit_ao.diffusers_integration.graph_form import load_graph
from fp4dit_ao.tensors.codebook import CodebookTensor
from tests.tiny import CALL, tiny_pipeline

CONFIG = replace(w4a6_codebook(), weight_search="weighted_mse")


def test_a_pipeline_is_calibrated_and_comes_back_from_its_files(tmp_path: Path) -> None:
    options = {"prompts": ["a cat"], "rounding": "nearest", "progress": False, **CALL}
    pipe = tiny_pipeline(layers=1)
    weighted = quantize_pipeline(pipe, CONFIG, **options).transformer
    weighted.save_pretrained(tmp_path / "q")
    own, loaded = state_of(weighted.graph), state_of(load_graph(tmp_path / "q").graph)
    plain = state_of(quantize_pipeline(pipe, w4a6_codebook(), **options).transformer.graph)
    names = [name for name, x in own.items() if isinstance(x.detach(), CodebookTensor)]
    assert names and all(
        torch.equal(getattr(own[name], part), getattr(loaded[name], part))
        for name in names
        for part in CodebookTensor.tensor_data_names
    )
    assert any(not torch.equal(own[name].index, plain[name].index) for name in names)


def test_modules_get_no_data() -> None:
    with pytest.raises(ValueError, match="needs calibration data; use quantize_pipeline"):
        quantize_modules(tiny_pipeline(layers=1).transformer, CONFIG)
