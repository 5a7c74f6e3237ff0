"""Modular pipelines of diffusers, put together of blocks, with a quantized transformer among their components."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, ComponentsManager, FlowMatchEulerDiscreteScheduler, ModularPipeline
from diffusers.modular_pipelines import FluxAutoBlocks
from torch import nn

from benchmarks.families import quantize, small_model
from fp4dit_ao import capture, example_inputs, quantize_modules

FORMS = {
    "graph": lambda model: quantize(model, capture(model, example_inputs(model)), "w4a6"),
    "module": lambda model: quantize_modules(copy.deepcopy(model), "w4a6"),
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_model("FLUX.1")


@pytest.fixture(scope="module")
def forms(model: nn.Module) -> dict[str, Any]:
    return {form: make(model) for form, make in FORMS.items()}


def pipeline(transformer: Any) -> ModularPipeline:
    blocks = FluxAutoBlocks()
    blocks.sub_blocks.pop("text_encoder")
    pipe = blocks.init_pipeline()
    vae = AutoencoderKL(
        block_out_channels=(8,),
        latent_channels=transformer.config.in_channels // 4,
        norm_num_groups=4,
        shift_factor=0.0,
    )
    pipe.update_components(transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler())
    return pipe


def draw(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator, config = torch.Generator().manual_seed(0), pipe.transformer.config
    latents: torch.Tensor = pipe(
        prompt_embeds=torch.randn(1, 7, config.joint_attention_dim, generator=generator),
        pooled_prompt_embeds=torch.randn(1, config.pooled_projection_dim, generator=generator),
        height=32, width=32, num_inference_steps=2, generator=generator, output="latents",
    )  # fmt: skip
    return latents


@pytest.mark.parametrize("form", FORMS)
def test_it_draws_is_saved_and_loaded(form: str, forms: dict[str, Any], model: nn.Module, tmp_path: Path) -> None:
    exact, transformer = draw(pipeline(model)), forms[form]
    pipe = pipeline(transformer)
    image = draw(pipe)
    assert 0 < (image - exact).norm() / exact.norm() < 0.35
    pipe.save_pretrained(str(tmp_path))
    loaded = ModularPipeline.from_pretrained(str(tmp_path))
    loaded.load_components(names=["transformer", "vae", "scheduler"])
    assert type(loaded.transformer) is type(transformer)
    assert torch.equal(draw(pipeline(loaded.transformer)), image)


def test_both_forms_draw_the_same(forms: dict[str, Any]) -> None:
    first, second = (draw(pipeline(transformer)) for transformer in forms.values())
    assert torch.equal(first, second)


@pytest.mark.parametrize("form", FORMS)
def test_a_manager_of_components_finds_it(form: str, forms: dict[str, Any]) -> None:
    manager, transformer = ComponentsManager(), forms[form]
    name = manager.add("transformer", transformer)
    assert manager.get_one(name="transformer") is transformer
    assert name in str(manager)
    assert type(transformer).__name__ in str(manager)
