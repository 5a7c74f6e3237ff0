"""GELU compiled through ``sigmoid``: every bfloat16 and float16, wild float32, and the graph that has it."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from fp4dit_ao import FP4DiTQuantizer, capture, lower
from fp4dit_ao.config import w4a6
from tests.graphs import TinyDiT, tiny_sample


@torch.compile(dynamic=True)
def compiled(x: torch.Tensor) -> torch.Tensor:
    return torch.ops.fp4dit_ao.tanh_gelu(x)


def exact(x: torch.Tensor) -> torch.Tensor:
    """In float64, without the cancellation of ``1 + tanh``."""
    return x.double() * torch.sigmoid(argument(x))


def argument(x: torch.Tensor) -> torch.Tensor:
    return 2 * (2 / torch.pi) ** 0.5 * (x.double() + 0.044715 * x.double() ** 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_is_the_nearest_or_its_neighbour(dtype) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    y, wanted = compiled(x), exact(x)
    finite = x.isfinite()
    assert torch.equal(y[~finite & (x > 0)], x[~finite & (x > 0)])
    assert y[x.isnan()].isnan().all()
    limits = torch.finfo(dtype)
    error = (y[finite].double() - wanted[finite]).abs()
    least = max(limits.tiny * limits.eps, 4e-38)  # of the type, and of float32, which flushes what is smaller
    assert (error <= limits.eps / 2 * 1.001 * wanted[finite].abs() + least).all()


@given(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=64))
def test_float32_keeps_its_relative_precision(values) -> None:
    x = torch.tensor(values)
    relative = 1e-6 + 4 * torch.finfo(torch.float32).eps * argument(x).abs()  # of a rounded argument's exponential
    assert (compiled(x).double() - exact(x)).abs().le(relative * exact(x).abs() + 1e-37).all()


def test_uncompiled_it_is_pytorchs() -> None:
    x = torch.randn(3, 5, 7).transpose(0, 2)
    assert torch.equal(torch.ops.fp4dit_ao.tanh_gelu(x), F.gelu(x, approximate="tanh"))


def test_lowered_graphs_have_it() -> None:
    model = TinyDiT()
    graph = lower(convert_pt2e(prepare_pt2e(capture(model, tiny_sample()), FP4DiTQuantizer().set_global(w4a6()))))
    targets = [node.target for node in graph.graph.nodes]
    assert torch.ops.aten.gelu.default not in targets
    assert torch.ops.fp4dit_ao.tanh_gelu.default in targets
