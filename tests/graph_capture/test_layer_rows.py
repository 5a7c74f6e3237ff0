"""Rows of linears are read off a graph's sizes; the oracle is what the model's own modules see when they are called."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from benchmarks.families import small_model
from fp4dit_ao import capture, example_inputs
from fp4dit_ao.families.sample_inputs import Size
from fp4dit_ao.graph_capture import sample_description
from fp4dit_ao.graph_capture.capturing import bind
from fp4dit_ao.graph_capture.layer_rows import layer_rows


def seen_rows(model: nn.Module, sample: dict[str, Any]) -> dict[str, int]:
    """Rows of every linear in a call of the model itself."""
    found: dict[str, int] = {}

    def hook(name: str) -> Any:
        return lambda module, args, output: found.update({name: output.numel() // output.shape[-1]})

    hooks = [m.register_forward_hook(hook(n)) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        model(**sample)
    for each in hooks:
        each.remove()
    return found


@functools.cache
def captured(family: str) -> tuple[nn.Module, GraphModule]:
    model = small_model(family).eval()
    return model, capture(model, example_inputs(model))


@pytest.mark.parametrize("family", ["PixArt-Σ", "FLUX.1"])
def test_rows_are_those_of_the_described_call(family: str) -> None:
    model, graph = captured(family)
    for size in (Size(batch=2, height=16, width=8, text=5), Size(batch=1, height=8, width=8, text=20)):
        sample = example_inputs(model, size)
        found = layer_rows(graph, sample_description.describe(bind(model, sample)))
        seen = seen_rows(model, sample)
        assert found.rows == seen
        assert found.tokens == size.batch * size.height * size.width // 4
        name, x = next((name, x) for name, x in sample.items() if isinstance(x, Tensor))
        assert found.source == f"{name} {'×'.join(map(str, x.shape))}"


@pytest.mark.parametrize("family", ["PixArt-Σ", "FLUX.1"])
def test_linears_read_the_same_value_that_read_the_same_tensor(family: str) -> None:
    model, graph = captured(family)
    sample = example_inputs(model)
    read: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda module, args, name=name: read.update({name: args[0]}))
    try:
        with torch.no_grad():
            model(**sample)
    finally:
        for module in model.modules():
            module._forward_pre_hooks.clear()
    inputs = layer_rows(graph, sample_description.describe(bind(model, sample))).inputs
    assert inputs.keys() == read.keys()
    for one in inputs:
        assert [inputs[other] == inputs[one] for other in inputs] == [read[other] is read[one] for other in inputs], one
    assert len(set(inputs.values())) < len(inputs)


def test_other_tokens_change_the_rows_of_the_image_alone() -> None:
    model, graph = captured("PixArt-Σ")
    sample = example_inputs(model, Size(batch=2, height=16, width=16, text=5))
    description = sample_description.describe(bind(model, sample))
    small, large = layer_rows(graph, description), layer_rows(graph, description, 4096)
    assert (small.tokens, large.tokens) == (128, 4096)
    for name, rows in small.rows.items():
        assert large.rows[name] == (4096 if rows == 128 else rows), name
    assert {128, 10, 2} <= set(small.rows.values())  # image, text, one vector an image
