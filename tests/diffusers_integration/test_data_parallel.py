"""LoRAs that learn beside low-bit weights in several processes, under DistributedDataParallel."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fp4dit_ao import example_inputs
from tests.diffusers_integration.test_lora import adapter, flux
from tests.processes import in_processes

CASES = (("w4a6_codebook", False), ("nvfp4", True))
"""Recipes, and whether PEFT wraps the model, rather than diffusers loading the LoRA."""


def with_lora(recipe: str, wrapped: bool) -> Any:
    model: Any = flux(recipe)
    if not wrapped:
        model.load_lora_adapter(adapter(model, 1), adapter_name="one")
        return model.train()
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["to_q", "proj_mlp"], init_lora_weights=False)).train()


def gradients(model: nn.Module, sample: dict[str, Any]) -> dict[str, Tensor]:
    """Of the mean square of the model's output."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        parameter.grad = None
    model(**sample, return_dict=False)[0].square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def process(rank: int) -> None:
    samples = [example_inputs(flux(None), seed=seed) for seed in range(2)]
    for recipe, wrapped in CASES:
        model = with_lora(recipe, wrapped)
        alone = [gradients(model, sample) for sample in samples]
        together = gradients(DistributedDataParallel(copy.deepcopy(model)), samples[rank])
        assert len(together) == len(alone[0]) > 3
        for name, found in together.items():
            first, second = (each[name.removeprefix("module.")] for each in alone)
            torch.testing.assert_close(found, (first + second) / 2, rtol=1e-5, atol=1e-8, msg=f"{recipe} {name}")


def test_two_processes_average_their_gradients() -> None:
    pytest.importorskip("peft")
    in_processes(process)
