"""Pipelines that call two transformers, or one in two ways."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fp4dit_ao import QuantizedTransformer, collect_samples, load_pipeline, quantize_pipeline
from fp4dit_ao.graph_capture.sample_description import difference_of_kind
from tests.diffusers_integration.test_mixed_types import wan
from tests.tiny import tiny_pipeline

NEAREST: dict[str, Any] = {"rounding": "nearest", "progress": False}


def two_stages() -> Any:
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline

    text = tiny_pipeline(layers=1)  # not called: a folder must hold one
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    return WanPipeline(
        text.tokenizer, text.text_encoder, vae, scheduler, wan(), transformer_2=wan(), boundary_ratio=0.5
    )


def call(steps: int = 2) -> dict[str, Any]:
    torch.manual_seed(0)
    text, negative = torch.randn(1, 8, 64), torch.randn(1, 8, 64)
    return {
        "prompt_embeds": text, "negative_prompt_embeds": negative, "height": 32, "width": 32, "num_frames": 5,
        "num_inference_steps": steps,
    }  # fmt: skip


def draw(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    frames: torch.Tensor = pipe(**call(), output_type="latent", generator=torch.Generator().manual_seed(1)).frames
    return frames


def test_both_transformers_of_two_stages_are_quantized_saved_and_loaded(tmp_path: Path) -> None:
    pipe = two_stages()
    quantized: Any = quantize_pipeline(pipe, "w4a6", **NEAREST, **call())
    for name in ("transformer", "transformer_2"):
        assert isinstance(getattr(quantized, name), QuantizedTransformer)
        assert not isinstance(getattr(pipe, name), QuantizedTransformer)
    expected = draw(quantized)
    quantized.save_pretrained(tmp_path / "saved")
    loaded: Any = load_pipeline(tmp_path / "saved")
    assert isinstance(loaded.transformer_2, QuantizedTransformer)
    assert torch.equal(draw(loaded), expected)
    modules: Any = load_pipeline(tmp_path / "saved", form="module")
    assert type(modules.transformer_2).__name__ == "WanTransformer3DModel"


def test_a_transformer_that_is_not_named_stays() -> None:
    pipe = two_stages()
    quantized: Any = quantize_pipeline(pipe, "w4a6", components=["transformer_2"], **NEAREST, **call())
    assert quantized.transformer is pipe.transformer
    assert isinstance(quantized.transformer_2, QuantizedTransformer)
    with pytest.raises(ValueError, match="WanPipeline has no transformer_3 to quantize"):
        quantize_pipeline(pipe, "w4a6", components=["transformer_3"], **NEAREST, **call())


def test_a_stage_that_is_never_reached_is_an_error() -> None:
    with pytest.raises(ValueError, match="made no call of its transformer_2; give more num_inference_steps"):
        collect_samples(two_stages(), component="transformer_2", progress=False, **call(steps=1))


def skip_layer_guidance(start: float) -> tuple[Any, dict[str, Any]]:
    """Stable Diffusion 3 and a call of it, which leaves layers out in calls of their own from that part of the steps on."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    model = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=64, caption_projection_dim=64, pooled_projection_dim=64, pos_embed_max_size=32,
    )  # fmt: skip
    pipe = StableDiffusion3Pipeline(model, FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, None, None)
    text, pooled = torch.randn(1, 8, 64), torch.randn(1, 64)
    return pipe, {
        "prompt_embeds": text, "pooled_prompt_embeds": pooled, "negative_prompt_embeds": text, "height": 64, "width": 64,
        "negative_pooled_prompt_embeds": pooled, "num_inference_steps": 3, "skip_guidance_layers": [0],
        "skip_layer_guidance_start": start, "skip_layer_guidance_stop": 1.0,
    }  # fmt: skip


TWO_KINDS = r"more than one way: skip_layers is None in one call, and in another \[0\].*leave out"


@pytest.mark.parametrize("samples", [1, 8])
def test_two_kinds_of_calls_are_refused_before_anything_is_learned(samples: int) -> None:
    pipe, call = skip_layer_guidance(start=-1.0)
    with pytest.raises(ValueError, match=TWO_KINDS):
        collect_samples(pipe, progress=False, samples=samples, **call)


def test_a_second_kind_that_comes_late_is_refused_where_no_data_is_looked_at() -> None:
    pipe, call = skip_layer_guidance(start=0.5)
    with pytest.raises(ValueError, match=TWO_KINDS):
        quantize_pipeline(pipe, "w4a6", **NEAREST, **call)


def test_what_makes_calls_of_one_kind() -> None:
    x, y = torch.ones(2, 3), torch.ones(5, 4)
    assert difference_of_kind({"x": x, "height": 8}, {"x": y, "height": 9, "return_dict": False}) is None
    assert difference_of_kind({"x": x}, {"x": x, "mask": None}) is None
    assert (
        difference_of_kind({"x": x}, {"x": x[0]}) == "x must have 2 dimensions in one call, and in another shape (3,)"
    )
    assert difference_of_kind({"x": x}, {"x": x, "mask": y}) == (
        "mask is None in one call, and in another a tensor of shape (5, 4)"
    )
    assert difference_of_kind({"mode": "a"}, {"mode": "b"}) == "mode is 'a' in one call, and in another 'b'"
