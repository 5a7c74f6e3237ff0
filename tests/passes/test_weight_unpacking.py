"""Weights as bfloat16: what a layer then computes, which layers, and what refuses them. Bytes: tests/tensors/test_levels.py."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp4dit_ao import MinifloatTensor, QuantConfig, unpack_weights
from fp4dit_ao.passes.weight_unpacking import refuse_unpacked
from fp4dit_ao.schemes import scheme_of


def model_of(*recipes: str, dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    """Linears whose weights are quantized by these recipes."""
    model = nn.Sequential(*(nn.Linear(128, 128, dtype=dtype) for _ in recipes)).requires_grad_(False)
    for linear, recipe in zip(model, recipes, strict=True):
        config = QuantConfig.from_name(recipe)
        linear.weight = nn.Parameter(
            scheme_of(config).round_to_nearest("fc", linear.weight, config), requires_grad=False
        )
    return model


@pytest.mark.parametrize("recipe", ["w4a6", "w4a6_codebook", "w4a6_static", "mxfp4", "nvfp4"])
def test_a_layer_multiplies_its_weights_values_in_bfloat16(recipe: str) -> None:
    model = model_of(recipe)
    values = model[0].weight.dequantize(torch.bfloat16)
    assert unpack_weights(model, "bfloat16") is model
    assert type(model[0].weight) is nn.Parameter and model[0].weight.dtype == torch.bfloat16
    x = torch.randn(5, 128).bfloat16()
    assert torch.equal(model(x), F.linear(x, values, model[0].bias))


def test_only_the_named_layers_change() -> None:
    model = model_of("w4a6", "w4a6", "w4a6_codebook")
    before = [linear.weight for linear in model]
    unpack_weights(model, "bfloat16", ["1"])
    assert [linear.weight is weight for linear, weight in zip(model, before, strict=True)] == [True, False, True]
    unpack_weights(model, "bfloat16", [])
    unpack_weights(model, "int8", ["0"])
    assert isinstance(model[2].weight, Tensor) and model[2].weight is before[2]
    with pytest.raises(ValueError, match=r"7 has no packed weight to unpack to bfloat16 \(2 such layers\)"):
        unpack_weights(model, "bfloat16", ["2", "7", "fc"])
    assert model[2].weight is before[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_that_is_more_exact_is_refused(dtype: torch.dtype) -> None:
    model = model_of("w4a6", dtype=dtype)
    with pytest.raises(
        ValueError, match=rf"0.weight: the model runs in {dtype}, and bfloat16 is less exact; cast it first"
    ):
        unpack_weights(model, "bfloat16")
    assert isinstance(model[0].weight, MinifloatTensor)


@pytest.mark.parametrize("to", ["int8", "bfloat16"])
def test_what_was_unpacked_is_refused_also_after_a_copy_and_a_move(to: str) -> None:
    model = model_of("w4a6", "w4a6")
    refuse_unpacked(model, "saving")
    unpack_weights(model, to, ["0"])
    for found in (model, copy.deepcopy(model), copy.deepcopy(model).to(torch.float32)):
        with pytest.raises(ValueError, match="saving needs packed weights, and these were unpacked"):
            refuse_unpacked(found, "saving")
