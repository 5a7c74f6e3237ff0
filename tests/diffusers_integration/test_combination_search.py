"""The search for a combination of methods: what it tries, what it keeps, and that a killed run goes on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fp4dit_ao import FP4DiTQuantizer, ReconstructionConfig
from fp4dit_ao.config import RECIPES
from fp4dit_ao.diffusers_integration.combination_search import Combination, CombinationSearch
from fp4dit_ao.diffusers_integration.pipeline_quantization import _Methods, _quantized, _searched, quantize_pipeline
from fp4dit_ao.passes.fine_tuning import FineTuneConfig
from tests.graphs import TinyDiT, tiny_sample

ERRORS = {
    "nearest": 10.0,
    "weight_equalization+nearest": 11.0,
    "smoothquant+nearest": 8.0,
    "smoothquant+gptq": 5.0,
    "smoothquant+scale_aware": 4.0,
    "smoothquant+scale_aware+bias_correction": 4.5,
}


def search(folder: Path | None = None, key: str = "a", kill: str = "") -> tuple[CombinationSearch[str], list[str]]:
    made: list[str] = []

    def quantize(combination: Combination, own: Path | None) -> str:
        assert (own is None) == (folder is None) and (own is None or own.name == combination.name)
        if combination.name == kill:
            raise KeyboardInterrupt
        made.append(combination.name)
        return f"model of {combination.name}"

    roundings = ("gptq", "scale_aware")
    return CombinationSearch(quantize, lambda x: ERRORS[x.removeprefix("model of ")], roundings, folder, key), made


def test_each_part_is_tried_on_what_was_kept_and_the_best_model_is_returned() -> None:
    found, made = search()
    assert found.run() == "model of smoothquant+scale_aware"
    assert made == list(ERRORS) == list(found.report.errors), "six models, none twice"
    assert found.report.best == "smoothquant+scale_aware"
    (best,) = (line for line in found.report.to_markdown().splitlines() if "best" in line)
    assert best.split("|")[1].strip() == "smoothquant+scale_aware"


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    killed, _ = search(tmp_path, kill="smoothquant+scale_aware+bias_correction")
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    again, made = search(tmp_path)
    assert again.run() == "model of smoothquant+scale_aware"
    assert made == ["smoothquant+scale_aware+bias_correction", "smoothquant+scale_aware"], "the rest, and the best anew"
    with pytest.raises(ValueError, match="belongs to another run"):
        search(tmp_path, key="b")


def test_errors_are_those_of_the_model_on_samples_that_nothing_saw() -> None:
    data = [tiny_sample(seed=seed) for seed in range(10)]
    config = replace(RECIPES["w4a6_e2m1"](), attention=None)
    model, quantizer = TinyDiT().eval(), FP4DiTQuantizer().set_global(config)
    rounding = ReconstructionConfig("gptq", batch_size=8)
    methods = _Methods((), "least_error", None, rounding, None, FineTuneConfig())
    (graph, report, tuned), tried = _searched(model, data, quantizer, methods, None, False)
    assert list(tried.errors)[:2] == ["nearest", "weight_equalization+nearest"]
    assert len(tried.errors) == 5 and tried.errors[tried.best] == min(tried.errors.values())
    with torch.no_grad():
        wanted = model(**data[9])[0]
        error = (graph(**data[9])[0] - wanted).square().mean() / wanted.square().mean()
        assert tried.errors[tried.best] == pytest.approx(float(error), rel=1e-4)
        nearest = replace(methods, rounding=replace(rounding, rounding="nearest"))
        plain, *_ = _quantized(model, data[:9], quantizer, nearest, None, None, None, False)
        error = (plain(**data[9])[0] - wanted).square().mean() / wanted.square().mean()
        assert tried.errors["nearest"] == pytest.approx(float(error), rel=1e-4)
    assert (report is not None) == ("gptq" in tried.best) and (tuned is not None) == ("bias" in tried.best)


def test_parts_that_it_finds_itself_are_refused() -> None:
    pipe: Any = type("Pipe", (), {"components": {}, "transformer": TinyDiT()})()
    with pytest.raises(ValueError, match="search_combination finds transforms and fine-tuning itself"):
        quantize_pipeline(pipe, "w4a6", search_combination=True, transforms=["smoothquant"])
