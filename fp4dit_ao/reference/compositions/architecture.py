"""Untrained parts of the composition pipeline: transformer, tokenizer, scheduler, and an autoencoder that does nothing."""

import re

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtTransformer2DModel
from torch import nn
from transformers import PreTrainedTokenizerFast, T5TokenizerFast

from fp4dit_ao.reference.architecture import TextToLatent, build_text_encoder, initialize
from fp4dit_ao.reference.compositions.layouts import CANVAS, layouts
from fp4dit_ao.reference.compositions.vocabulary import COLOURS, EMOJI, TEXT_LENGTH, plural

PATCH = 8
"""Side of a patch, in pixels: 64 tokens a picture, so that two cores draw one in a second or two."""
WIDTH = 384
LAYERS = 8

GENERATION: dict[str, object] = {
    "num_inference_steps": 20, "guidance_scale": 2.0, "height": CANVAS, "width": CANVAS, "use_resolution_binning": False,
    "max_sequence_length": TEXT_LENGTH, "clean_caption": False,
}  # fmt: skip
"""Default call arguments of the trained pipeline, written beside it as ``generation.json``."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer with a piece for every word of the prompts, in T5's own wrapper (pad 0, end 1, unknown 2)."""
    words = {word for layout in layouts() for word in re.sub(r"\{.*?\}", "", layout.text).split()}
    words |= {"a", "an", "big", "on", *EMOJI, *map(plural, EMOJI), *COLOURS}
    pieces = ["<pad>", "</s>", "<unk>", *(f"▁{word}" for word in sorted(words))]
    return T5TokenizerFast(vocab=[(piece, 0.0) for piece in pieces], extra_ids=0, model_max_length=TEXT_LENGTH)


def build_transformer(width: int = WIDTH, layers: int = LAYERS) -> PixArtTransformer2DModel:
    """Transformer on pixels, of 20.6 M parameters by default; ``width`` in 64s (a head), for the quantizer in 128s."""
    model = PixArtTransformer2DModel(
        num_attention_heads=width // 64, attention_head_dim=64, in_channels=3, out_channels=3, num_layers=layers,
        cross_attention_dim=width, sample_size=CANVAS, patch_size=PATCH, caption_channels=256,
        use_additional_conditions=False,
    )  # fmt: skip
    initialize(model, gain=0.5)  # half as wide: more of what the weights end up as is training's
    return model


def build_model(vocabulary: int, width: int = WIDTH, layers: int = LAYERS) -> TextToLatent:
    """Untrained text encoder and transformer."""
    return TextToLatent(build_text_encoder(vocabulary), build_transformer(width, layers))


def scheduler() -> DPMSolverMultistepScheduler:
    """DPM-Solver++ of second order on straight paths: at noise level s the input is (1 - s) picture + s noise, and the
    transformer predicts the picture."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000, prediction_type="sample", use_flow_sigmas=True, algorithm_type="dpmsolver++",
        solver_order=2,
    )  # fmt: skip


LARGE = 64.0
"""Constant in two of the channels of :func:`pixel_autoencoder`, large beside pixels in [-1, 1]."""


@torch.no_grad()
def pixel_autoencoder() -> AutoencoderKL:
    """Autoencoder whose latents are the pixels, to 1/1000, so that a pixel-space model fits pipelines for latents.

    Convolutions carry x, -x and a large constant of both signs; the normalization before the last convolution then
    divides by what is nearly the constant's half, and silu(y) - silu(-y) = y undoes the nonlinearity. Everything else adds
    zero.
    """
    model = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=3, sample_size=CANVAS, block_out_channels=(8,), layers_per_block=1,
        norm_num_groups=1, down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.0,
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    for part in (model.encoder, model.decoder):
        for channel in range(3):
            part.conv_in.weight[channel, channel, 1, 1] = 1
            part.conv_in.weight[3 + channel, channel, 1, 1] = -1
            part.conv_out.weight[channel, channel, 1, 1] = LARGE / 2
            part.conv_out.weight[channel, 3 + channel, 1, 1] = -LARGE / 2
        part.conv_in.bias[6:] = torch.tensor([LARGE, -LARGE])
    model.encoder.conv_out.bias[3:] = -30  # log variances
    return model
