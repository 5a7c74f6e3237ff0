"""Gradients through low-bit linears and attention, against autograd on the dequantized operands."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fp4dit_ao.config import QuantConfig
from fp4dit_ao.ops import choose_scale, fake_quantize
from fp4dit_ao.schemes import scheme_of
from fp4dit_ao.tensors.levels import LevelTensor

RECIPES = ["w4a6", "w4a8", "w4a6_codebook", "nvfp4", "mxfp4", "mxfp6_e2m3"]


def quantized(recipe: str) -> Any:
    torch.manual_seed(0)
    config = QuantConfig.from_name(recipe)
    return scheme_of(config).round_to_nearest("alone", torch.randn(24, 256), config)


def gradients(weight: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(2, 5, 256, dtype=dtype, requires_grad=True)
    bias = torch.randn(24, dtype=dtype, requires_grad=True)
    y = F.linear(x, weight, bias)
    y.backward(torch.randn(2, 5, 24).to(dtype))  # type: ignore[no-untyped-call]
    return [x.grad, bias.grad]  # type: ignore[list-item]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPES)
def test_linears_pass_the_gradient_of_their_stored_values(recipe: str, dtype: torch.dtype) -> None:
    weight = quantized(recipe)
    for ours, right in zip(gradients(weight, dtype), gradients(weight.dequantize(dtype), dtype), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, right)


def test_so_do_unpacked_weights() -> None:
    weight = quantized("int_w4a8")
    ours, right = gradients(LevelTensor.from_packed(weight, "int8"), torch.float32), gradients(weight, torch.float32)
    torch.testing.assert_close(ours, right)


def test_nothing_is_kept_for_a_gradient_that_nobody_wants() -> None:
    x = torch.randn(5, 256, requires_grad=True)
    weight = nn.Parameter(quantized("w4a6"), requires_grad=False)
    assert not F.linear(x.detach(), weight).requires_grad
    with torch.no_grad():
        assert not F.linear(x, weight).requires_grad


@pytest.mark.parametrize("recipe", ["w4a6", "nvfp4"])
def test_gradients_pass_a_compiled_linear(recipe: str) -> None:
    weight = quantized(recipe)
    linear = torch.compile(lambda x, bias: F.linear(x, weight, bias), backend="aot_eager", fullgraph=True)
    x, bias = torch.randn(5, 256, requires_grad=True), torch.randn(24, requires_grad=True)
    linear(x, bias).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(5, -1))
    assert bias.grad is not None
    assert (bias.grad == 5).all()


@pytest.mark.parametrize("fmt", ["e2m3", "e2m1", "int8"])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_passes_the_gradient_of_its_rounded_inputs(masked: bool, fmt: str) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(1, 2, tokens, 16, requires_grad=True) for tokens in (7, 9, 9)]
    mask = torch.randn(1, 1, 7, 9, requires_grad=True) if masked else None
    rounded = []
    for x in inputs:
        scale = choose_scale(x.detach(), [1, 1, 1, -1], fmt, torch.float32)
        rounded.append(fake_quantize(x.detach(), [1, 1, 1, -1], scale, fmt, torch.float32).requires_grad_())
    copied = None if mask is None else mask.detach().clone().requires_grad_()
    y, right = torch.ops.fp4dit_ao.attention(*inputs, mask, None, fmt), F.scaled_dot_product_attention(*rounded, copied)
    torch.testing.assert_close(y, right)
    for result in (y, right):
        result.backward(torch.ones_like(y))
    ours = [*inputs, mask] if mask is not None else inputs
    theirs = [*rounded, copied] if copied is not None else rounded
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
