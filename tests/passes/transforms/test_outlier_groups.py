"""Outlier groups: the orders, the function that stays, what is reordered and what is not, errors that fall, files."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from benchmarks.families import small_model
from fp4dit_ao import QuantizedTransformer, capture, example_inputs, lower, quantizer_for, transform
from fp4dit_ao.checkpoint import graph_rebuilding
from fp4dit_ao.config import RECIPES
from fp4dit_ao.diffusers_integration.graph_form import load_graph
from fp4dit_ao.diffusers_integration.module_conversion import load_modules
from fp4dit_ao.diffusers_integration.module_form import dequantize_modules
from fp4dit_ao.graph_capture import sample_description
from fp4dit_ao.graph_capture.capturing import bind
from fp4dit_ao.passes.transforms.outlier_groups import OutlierGroups, candidate_orders
from tests.graphs import show
from tests.passes.transforms.layers import Layer, quantized, relative

NVFP4 = replace(RECIPES["nvfp4"](), skip=())


def scattered(seed: int = 0) -> tuple[Layer, list[dict[str, Tensor]]]:
    """Every eighth channel of the inputs, or so, is much larger than the others, and its column of the weights smaller."""
    generator = torch.Generator().manual_seed(seed)
    model = Layer().eval()
    sizes = torch.where(torch.arange(128) % 8 == 3, 24.0, 1.0)
    with torch.no_grad():
        for linear in (model.one, model.two):
            linear.weight.copy_(torch.randn(32, 128, generator=generator) / sizes / 10)
    return model, [{"x": torch.randn(2, 48, 128, generator=generator) * sizes} for _ in range(2)]


def test_orders_sort_by_either_size_or_both() -> None:
    inputs, columns = torch.tensor([1.0, 5.0, 2.0, 5.0]), torch.tensor([9.0, 1.0, 2.0, 1.0])
    found = [order.tolist() for order in candidate_orders(inputs, columns)]
    assert found == [[0, 1, 2, 3], [1, 3, 2, 0], [0, 2, 1, 3], [0, 1, 3, 2]]


@torch.no_grad()
def test_linears_that_share_an_input_are_given_one_order() -> None:
    model, samples = scattered()
    weight = model.one.weight.clone()
    method = OutlierGroups()
    graph = transform(capture(model, samples[0]), samples[:1], [method], NVFP4, progress=False)
    assert [line for line in show(graph).splitlines() if not line.endswith(".bias")] == [
        "one_weight = self.one.weight",
        "two_weight = self.two.weight",
        "one_channel_order = self.one.channel_order",
        "index_select_default = index_select(x, -1, one_channel_order)",
        "linear = linear(index_select_default, one_weight, one_bias)",
        "linear_1 = linear(index_select_default, two_weight, two_bias)",
        "sub = sub.Tensor(linear, linear_1)",
        "return (sub,)",
    ]
    assert torch.equal(model.one.weight, weight), "the model that was captured stays as it is"
    order = graph.get_buffer("one.channel_order")
    assert sorted(order.tolist()) == list(range(128))
    np.testing.assert_array_equal(graph.get_parameter("one.weight").numpy(), weight.numpy()[:, order.numpy()])
    large = (order % 8 == 3).nonzero().flatten()
    assert large.max() - large.min() == len(large) - 1 == 15, "the large channels are one block of 16"
    assert relative(graph(**samples[1]), model(**samples[1])) < 2e-6
    record = {k: v for k, v in graph.meta["fp4dit_ao_transforms"][0].items() if k != "name"}
    before = dict(graph.named_parameters())
    OutlierGroups.from_record(record).apply(graph)
    assert all(graph.get_parameter(name) is parameter for name, parameter in before.items())
    fresh = capture(model, samples[0])
    OutlierGroups.from_record(record).apply(fresh)
    assert torch.equal(fresh(**samples[1]), model(**samples[1])), "in place, until the stored order comes"


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("recipe", "factor"), [("nvfp4", 1.5), ("mxfp4", 1.5), ("e2m1, groups of 16", 1.1), ("int4, groups of 16", 1.1)]
)
@torch.no_grad()
def test_channels_of_like_size_share_scales(recipe: str, factor: float, seed: int) -> None:
    """Judged on other inputs than fitted to."""
    model, samples = scattered(seed)
    config = {
        "e2m1, groups of 16": replace(RECIPES["w4a8_int8"](), group_size=16, pre_gelu_weight=None, skip=()),
        "int4, groups of 16": replace(RECIPES["int_w4a8"](), group_size=16, skip=()),
    }.get(recipe) or replace(RECIPES[recipe](), skip=())
    expected, errors = model(**samples[1]), []
    for transforms in ([], ["outlier_groups"]):
        graph = transform(capture(model, samples[0]), samples[:1], transforms, config, progress=False)
        errors.append(relative(quantized(graph, config, samples[0])(**samples[1]), expected))
    assert errors[1] < errors[0] / factor


@torch.no_grad()
def test_what_gains_nothing_is_left_alone() -> None:
    """One scale a row and a token: any order is as good."""
    model, samples = scattered()
    config = replace(RECIPES["int_w4a8"](), weight_granularity="channel", skip=())
    method = OutlierGroups()
    graph = transform(capture(model, samples[0]), samples[:1], [method], config, progress=False)
    assert method.groups == []
    assert "index_select" not in show(graph)


@torch.no_grad()
def test_modules_and_files_compute_the_same_bits(tmp_path: Path) -> None:
    model = small_model("PixArt-Σ")
    generator = torch.Generator().manual_seed(0)
    for linear in (x for x in model.transformer_blocks.modules() if isinstance(x, torch.nn.Linear)):
        linear.weight *= torch.where(torch.rand(linear.in_features, generator=generator) < 0.1, 20.0, 1.0)
    sample = example_inputs(model)
    quantizer = quantizer_for(model, "nvfp4")
    method = OutlierGroups(rows=32)
    graph = transform(capture(model, sample), [sample], [method], quantizer, progress=False)
    assert len(method.groups) > 3
    lowered = lower(convert_pt2e(prepare_pt2e(graph, quantizer), fold_quantize=False))
    decisions = graph_rebuilding.resolve(quantizer.decisions.values(), lowered)
    whole = QuantizedTransformer(lowered, model, sample_description.describe(bind(model, sample)), decisions)
    whole.save_pretrained(tmp_path / "saved")
    expected = whole(**sample, return_dict=False)[0]
    modules = load_modules(tmp_path / "saved")
    for form in (load_graph(tmp_path / "saved"), modules):
        assert torch.equal(form(**sample, return_dict=False)[0], expected)
    modules.save_pretrained(tmp_path / "again")
    assert torch.equal(load_graph(tmp_path / "again")(**sample, return_dict=False)[0], expected)
    name = method.groups[0].linears[-1]
    original = model.get_parameter(f"{name}.weight")
    changed = method.float_weight(f"{name}.weight", original, whole.graph)
    stored = whole.graph.get_parameter(f"{name}.weight").dequantize()
    assert relative(stored, changed) < 0.2
    assert relative(dequantize_modules(modules).get_submodule(name).weight, original) < 0.2


def test_refusals() -> None:
    model, samples = scattered()
    graph = capture(model, samples[0])
    with pytest.raises(ValueError, match="OutlierGroups needs to know the formats"):
        OutlierGroups().fit(graph, samples)
    transform(graph, samples, ["outlier_groups"], NVFP4, progress=False)
    with pytest.raises(ValueError, match=r"reordered already: it has one\.channel_order; apply outlier_groups once"):
        transform(graph, samples, ["outlier_groups"], NVFP4, progress=False)
    record = {"groups": [{"linears": ["three"]}]}
    with pytest.raises(ValueError, match="no linear three, which was reordered; it is of another model"):
        OutlierGroups.from_record(record).apply(capture(model, samples[0]))
    with pytest.raises(ValueError, match="is empty"):
        OutlierGroups.from_record({"groups": [{"linears": []}]})
