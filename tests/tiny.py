"""A whole text-to-image pipeline, made from nothing in well under a second: every test that needs a pipeline uses it."""

import math
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn

CALL = {
    "num_inference_steps": 2, "guidance_scale": 3.0, "height": 32, "width": 32, "use_resolution_binning": False,
    "max_sequence_length": 8, "clean_caption": False,
}  # fmt: skip
"""How :func:`tiny_pipeline` is meant to be called."""

WORDS = ("a", "red", "blue", "green", "cat", "dog", "tree", "house", "with", "star")


def unigram(pieces: list[tuple[str, float]]) -> Tokenizer:
    """T5's tokenizer of these pieces and their scores; the first three are padding, end and unknown."""
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def tiny_pipeline(seed: int = 0, width: int = 128, layers: int = 2) -> Any:
    """A ``PixArtSigmaPipeline`` with random weights: 8-token prompts, 8 x 8 latents of 4 channels, 32 px images.

    Args:
        seed: of every weight; equal seeds give equal pipelines.
        width: of the transformer and the text encoder; a multiple of 64.
        layers: transformer blocks.
    """
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -5.0)] + [("▁" + word, -2.0) for word in WORDS]
        tokenizer = T5TokenizerFast(tokenizer_object=unigram(pieces), extra_ids=0, model_max_length=8)
        encoder = T5EncoderModel(
            T5Config(
                vocab_size=len(pieces), d_model=width, d_kv=32, d_ff=width, num_layers=1, num_heads=2, pad_token_id=0
            )
        )
        autoencoder = AutoencoderKL(
            latent_channels=4, sample_size=32, norm_num_groups=8, layers_per_block=1, block_out_channels=(8, 8, 16),
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        )  # fmt: skip
        transformer = PixArtTransformer2DModel(
            num_attention_heads=width // 64, attention_head_dim=64, in_channels=4, out_channels=4, num_layers=layers,
            cross_attention_dim=width, sample_size=8, patch_size=2, caption_channels=width,
            use_additional_conditions=False,
        )  # fmt: skip
        for module in transformer.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
    scheduler = DPMSolverMultistepScheduler(beta_end=0.02, algorithm_type="dpmsolver++", prediction_type="v_prediction")
    pipe = PixArtSigmaPipeline(tokenizer, encoder.eval(), autoencoder.eval(), transformer.eval(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe
