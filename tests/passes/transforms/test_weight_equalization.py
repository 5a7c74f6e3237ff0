"""Weight equalization: the equation by NumPy, the function that stays, which pairs there are, files, refusals."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from fp4dit_ao import (
    FP4DiTQuantizer,
    QuantConfig,
    capture,
    collect_samples,
    quantize_modules,
    quantize_pipeline,
    transform,
)
from fp4dit_ao.config import RECIPES
from fp4dit_ao.diffusers_integration.graph_form import load_graph
from fp4dit_ao.diffusers_integration.module_conversion import load_modules
from fp4dit_ao.passes.transforms.weight_equalization import WeightEqualization, equalizing_factor
from tests.graphs import TinyDiT, show, tiny_sample
from tests.passes.transforms.layers import relative
from tests.tiny import CALL, tiny_pipeline


def uneven(layers: int = 1) -> TinyDiT:
    """Values in channels of very different size, made good by the projection behind them."""
    model = TinyDiT(layers=layers).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for block in model.blocks:
            sizes = torch.exp2(torch.randint(-3, 4, (128,), generator=generator).float())
            block.attn.to_v.weight *= sizes[:, None]
            block.attn.to_v.bias *= sizes
            block.attn.to_out.weight /= sizes
    return model


@pytest.fixture
def config() -> QuantConfig:
    return RECIPES["w4a6_e2m1"]()


@torch.no_grad()
def test_both_ranges_are_the_geometric_mean_and_the_function_stays(config) -> None:
    model, sample = uneven(layers=2), tiny_sample(tokens=9)
    graph = capture(model, sample)
    before, expected = show(graph), graph(**sample)[0]
    method = WeightEqualization()
    transform(graph, [], [method], config, progress=False)
    assert show(graph) == before, "values change, and nothing else"
    assert relative(graph(**sample)[0], expected) < 2e-6
    assert [(pair.folded, pair.linears) for pair in method.pairs] == [
        ([f"blocks.{i}.attn.to_v.weight", f"blocks.{i}.attn.to_v.bias"], [f"blocks.{i}.attn.to_out"]) for i in range(2)
    ]
    for block in ("blocks.0.attn", "blocks.1.attn"):
        v, o = (model.get_parameter(f"{block}.{name}.weight").double().numpy() for name in ("to_v", "to_out"))
        r1, r2 = np.abs(v).max(1), np.abs(o).max(0)
        s = np.sqrt(r1 * r2) / r2
        np.testing.assert_allclose(graph.get_parameter(f"{block}.to_v.weight").numpy(), v / s[:, None], rtol=1e-5)
        np.testing.assert_allclose(graph.get_parameter(f"{block}.to_out.weight").numpy(), o * s, rtol=1e-5)
        bias = model.get_parameter(f"{block}.to_v.bias").double().numpy()
        np.testing.assert_allclose(graph.get_parameter(f"{block}.to_v.bias").numpy(), bias / s, rtol=1e-5)
        found = [graph.get_parameter(f"{block}.{name}.weight").abs() for name in ("to_v", "to_out")]
        torch.testing.assert_close(found[0].amax(1), found[1].amax(0))


def test_dead_channels_keep_their_weights() -> None:
    factor = equalizing_factor(torch.tensor([0.0, 4.0, 2.0, 0.0]), torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert factor.tolist() == [1.0, 2.0, 1.0, 1.0]


@pytest.mark.parametrize("skip", ["*.to_v", "*.to_out"])
def test_both_must_be_quantized(skip: str, config) -> None:
    method = WeightEqualization()
    transform(
        capture(uneven(), tiny_sample()),
        [],
        [method],
        replace(config, skip=("pos_embedder", "proj_out", skip)),
        progress=False,
    )
    assert method.pairs == []
    assert not method.changes


@pytest.mark.parametrize("recipe", ["w4a6_e2m1", "int_w4a6", "w4a6_nf4", "w4a6_codebook", "int4 per channel"])
@torch.no_grad()
def test_uneven_channels_lose_their_effect(recipe: str) -> None:
    """Groups along the inputs of the second weight hold channels of all sizes: the error of its output falls."""
    config = QuantConfig("int4", "int8", pre_gelu_weight=None, attention=None, weight_granularity="channel")
    config = config if recipe == "int4 per channel" else replace(RECIPES[recipe](), attention=None)
    config = replace(config, skip=("pos_embedder", "proj_out", "*.ff.*", "*.to_q", "*.to_k"))
    model, sample = uneven(), tiny_sample(tokens=32)
    expected, errors = model(**sample)[0], []
    for transforms in ([], ["weight_equalization"]):
        graph = transform(capture(model, sample), [], transforms, config, progress=False)
        prepared = prepare_pt2e(graph, FP4DiTQuantizer().set_global(config))
        prepared(**sample)
        errors.append(relative(convert_pt2e(prepared)(**sample)[0], expected))
    assert errors[1] < 0.8 * errors[0]


def test_files_come_back_in_both_forms_with_the_same_bits(tmp_path: Path) -> None:
    pipe = tiny_pipeline(layers=1)
    prompts = ["a red cat", "a blue dog"]
    sample: dict[str, Any] = collect_samples(pipe, prompts, samples=1, progress=False, **CALL)[0]
    model: Any = quantize_pipeline(
        pipe,
        "w4a6_e2m1",
        prompts=prompts,
        rounding="nearest",
        transforms=["weight_equalization"],
        progress=False,
        **CALL,
    ).transformer
    model.save_pretrained(tmp_path / "saved")

    def run(x: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = x(**sample, return_dict=False)[0]
        return found

    graph, modules = load_graph(tmp_path / "saved"), load_modules(tmp_path / "saved")
    assert torch.equal(run(graph), run(model))
    assert torch.equal(run(modules), run(model))
    (method,) = modules.hf_quantizer.record.transforms
    attention = "transformer_blocks.0.attn1"
    assert [pair.linears for pair in method.pairs] == [[f"transformer_blocks.0.attn{i}.to_out.0"] for i in (1, 2)]
    assert sorted(method.refused_loras()) == [
        f"transformer_blocks.0.attn{i}.{name}" for i in (1, 2) for name in ("to_out.0", "to_v")
    ]
    assert method.float_weight(f"{attention}.to_v.weight", torch.zeros(1), graph.graph) is None
    other = torch.zeros(1)
    assert method.float_weight(f"{attention}.to_q.weight", other, graph.graph) is other


def test_refusals(config) -> None:
    graph = capture(uneven(), tiny_sample())
    with pytest.raises(ValueError, match="needs to know which linears are quantized"):
        WeightEqualization().fit(graph)
    with pytest.raises(ValueError, match="is empty"):
        WeightEqualization.from_record({"pairs": [{"folded": [], "linears": ["a"]}]})
    record = {"pairs": [{"folded": ["a.weight"], "linears": ["b"]}]}
    with pytest.raises(ValueError, match="no linear b, which was equalized; it is of another model"):
        WeightEqualization.from_record(record).apply(copy.deepcopy(graph))
    with pytest.raises(ValueError, match=r"'weight_equalization' needs the model's graph; use quantize_pipeline"):
        quantize_modules(tiny_pipeline(layers=1).transformer, transforms=["weight_equalization"])
