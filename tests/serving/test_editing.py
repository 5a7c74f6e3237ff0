"""Edits by a real pipeline that diffusers can start from an image: Stable Diffusion 3, small and quantized."""

from typing import Any

import numpy as np
import pytest
import torch

from fp4dit_ao import quantize_pipeline
from fp4dit_ao.serving.drawing import Painter
from fp4dit_ao.serving.engine_types import Edit, Style
from tests.tiny import tiny_pipeline


@pytest.fixture(scope="module")
def painter() -> Painter:
    """Two CLIP text encoders on the tiny pipeline's tokenizer, latents of 16 channels, no T5."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    tiny = tiny_pipeline()
    autoencoder = AutoencoderKL(
        latent_channels=16, sample_size=32, norm_num_groups=8, layers_per_block=1, block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, shift_factor=0.1,
    ).eval()  # fmt: skip
    config = CLIPTextConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, projection_dim=32,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    encoders = [CLIPTextModelWithProjection(config).eval() for _ in range(2)]
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=1, num_attention_heads=2,
        attention_head_dim=64, joint_attention_dim=128, caption_projection_dim=128,
        pooled_projection_dim=64, pos_embed_max_size=8,
    ).eval()  # fmt: skip
    clip = [part for encoder in encoders for part in (encoder, tiny.tokenizer)]
    pipe = StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(), autoencoder, *clip, None, None)
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 32, "width": 32, "max_sequence_length": 8}
    quantized = quantize_pipeline(pipe, "w4a6", prompts=["a cat"], steps=1, rounding="nearest", progress=False, **call)
    quantized.generation_defaults = call
    quantized.set_progress_bar_config(disable=True)
    return Painter(quantized)


def style(mask: Any, strength: float) -> Style:
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    return Style(32, 32, 4, Edit(image, mask, strength))


def test_both_kinds_of_edits_are_derived_of_the_quantized_pipeline(painter: Painter) -> None:
    assert painter.edits.keys() == {"image", "mask"}
    for pipe in painter.edits.values():
        assert type(pipe.transformer).__name__ == "QuantizedTransformer"


def test_an_edit_starts_from_the_image_and_takes_its_part_of_the_steps(painter: Painter) -> None:
    taken: list[int] = []
    painter.between_steps = lambda done, look: taken.append(done)
    first, second = painter.draw(style(None, 0.5), ["a red cat", "a blue dog"], [1, 2])
    assert taken == [1, 2]  # of four
    assert first.shape == (32, 32, 3) and (first != second).any()
    (again,) = painter.draw(style(None, 0.25), ["a red cat"], [1])
    assert (again != first).any()


@pytest.mark.parametrize("anew", [False, True])
def test_a_mask_keeps_the_rest(painter: Painter, anew: bool) -> None:
    """Where nothing is drawn anew, no prompt changes anything."""
    edited = style(np.full((32, 32), anew), 1.0)
    (cat,), (dog,) = (painter.draw(edited, [prompt], [1]) for prompt in ("a red cat", "a blue dog"))
    assert (cat != dog).any() == anew


def test_a_pipeline_that_diffusers_starts_from_no_image_has_no_edits(tiny_quantized: Any) -> None:
    assert Painter(tiny_quantized).edits == {}
