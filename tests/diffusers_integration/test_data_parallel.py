"""LoRAs that learn beside low-bit weights in several processes, under DistributedDataParallel."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fp4dit_ao import example_inputs
from fp4dit_ao.diffusers_integration.text_encoders import quantize_text_encoder
from tests.diffusers_integration.test_lora import adapter, flux
from tests.diffusers_integration.test_text_encoders import IDS, t5
from tests.processes import in_processes

Samples = list[dict[str, Any]]
"""One for each process."""


def transformer(recipe: str) -> tuple[Any, Samples]:
    return flux(recipe), [example_inputs(flux(None), seed=seed) for seed in range(2)]


def by_diffusers() -> tuple[nn.Module, Samples]:
    model, samples = transformer("w4a6_codebook")
    model.load_lora_adapter(adapter(model, 1), adapter_name="one")
    return model, samples


def by_peft() -> tuple[nn.Module, Samples]:
    model, samples = transformer("nvfp4")
    return wrapped(model, ["to_q", "proj_mlp"]), samples


def text_encoder() -> tuple[nn.Module, Samples]:
    return wrapped(quantize_text_encoder(t5()), ["q", "wi"]), [{"input_ids": IDS}, {"input_ids": IDS + 1}]


def wrapped(model: nn.Module, linears: list[str]) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    lora: nn.Module = get_peft_model(model, LoraConfig(r=4, target_modules=linears, init_lora_weights=False))
    return lora


def gradients(model: nn.Module, sample: dict[str, Any]) -> dict[str, Tensor]:
    """Gradients of the mean square of the model's output."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        parameter.grad = None
    model(**sample, return_dict=False)[0].square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def process(rank: int) -> None:
    for make in (by_diffusers, by_peft, text_encoder):
        model, samples = make()
        alone = [gradients(model, sample) for sample in samples]
        together = gradients(DistributedDataParallel(copy.deepcopy(model)), samples[rank])
        assert len(together) == len(alone[0]) > 3
        for name, found in together.items():
            first, second = (each[name.removeprefix("module.")] for each in alone)
            torch.testing.assert_close(found, (first + second) / 2, rtol=1e-5, atol=1e-8, msg=f"{make.__name__} {name}")


def test_two_processes_average_their_gradients() -> None:
    pytest.importorskip("peft")
    in_processes(process)
