"""Writes into slices become values: same numbers, gradients through them; what cannot be said so is left alone."""

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from fp4dit_ao.passes.functional_writes import make_functional


def exported(function, *inputs: Tensor) -> GraphModule:
    class Model(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return function(*inputs)

    graph: GraphModule = torch.export.export(Model(), inputs, strict=False).module(check_guards=False)
    return graph


def writes(graph: GraphModule) -> int:
    return sum(node.target is torch.ops.aten.copy_.default for node in graph.graph.nodes)


def rotary(x: Tensor, y: Tensor) -> Tensor:
    x = x * 2
    x[:, 3:] = x[:, 3:] * y[:, 3:]
    return x + y


def strided(x: Tensor, y: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[..., 0::2] = x[..., 0::2] - y[..., 1::2]
    out[..., 1::2] = x[..., 1::2] + y[..., 0::2]
    return out * x


def twice(x: Tensor, y: Tensor) -> Tensor:
    z = x * 3
    z[1:, 2:4] = y[1:, 2:4]
    total = z.sum()
    z[:2, :1] = total.expand(2, 1)
    return z


def broadcast(x: Tensor, y: Tensor) -> Tensor:
    z = x + 1
    z[:, 3:] = y[:, :1]
    return z


@pytest.mark.parametrize("function", [rotary, strided, twice, broadcast])
def test_the_same_numbers_and_gradients(function) -> None:
    x, y = torch.randn(4, 6), torch.randn(4, 6)
    graph = exported(function, x, y)
    assert writes(graph)
    make_functional(graph)
    assert not writes(graph)
    graph.graph.lint()
    assert torch.equal(graph(x, y), function(x, y))
    one, other = (value.clone().requires_grad_() for value in (x, x))
    graph(one, y).square().sum().backward()
    function(other, y).square().sum().backward()
    assert torch.equal(one.grad, other.grad)


def into_an_input(x: Tensor, y: Tensor) -> Tensor:
    x[:, 3:] = y[:, 3:]
    return x + 1


def seen_by_an_earlier_view(x: Tensor, y: Tensor) -> Tensor:
    z = x + 1
    view = z.view(-1)
    z[:, 3:] = y[:, 3:]
    return view * 2


@pytest.mark.parametrize("function", [into_an_input, seen_by_an_earlier_view])
def test_what_cannot_be_said_stays(function) -> None:
    x, y = torch.randn(4, 6), torch.randn(4, 6)
    graph = exported(function, x, y)
    make_functional(graph)
    assert writes(graph) == 1
    assert torch.equal(graph(x.clone(), y), function(x.clone(), y))
