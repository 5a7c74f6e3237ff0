"""What the ``forward`` of each family is given in one denoising step: random keyword arguments of the right shapes.

Enough to capture and to quantize with nearest rounding where no pipeline is at hand. To learn a rounding, take what a
pipeline really passes: :func:`fp4dit_ao.collect_samples`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Size:
    """How large a sample is. Latents count in the autoencoder's units, before patches."""

    batch: int = 2
    height: int = 16
    width: int = 16
    frames: int = 3
    text: int = 16
    """Tokens of text; families whose text length is part of the model take that instead."""


class Random:
    """Random tensors of one generator.

    Args:
        seed: of the generator.
        dtype: of the floating-point tensors.
    """

    def __init__(self, seed: int, dtype: torch.dtype):
        self._generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self.dtype)

    def whole(self, low: int, high: int, *shape: int) -> Tensor:
        """Whole numbers in [low, high)."""
        return torch.randint(low, high, shape, generator=self._generator)

    def mask(self, batch: int, text: int) -> Tensor:
        """1 for the tokens of a prompt of random length, at least one token, and 0 for the padding after it."""
        lengths = self.whole(1, text + 1, batch, 1)
        return (torch.arange(text) < lengths).long()

    def rotation(self, tokens: int, features: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of rotary embeddings, which pipelines keep in float32."""
        angles = torch.rand(tokens, features // 2, generator=self._generator).repeat_interleave(2, 1) * torch.pi
        return angles.cos(), angles.sin()


Inputs = Callable[[Any, Size, Random], dict[str, Any]]
"""From a model's config, a size and a source of random tensors to the keyword arguments of ``forward``."""


def pixart(config: Any, size: Size, random: Random) -> dict[str, Any]:
    micro = config.use_additional_conditions
    if micro is None:
        micro = config.sample_size == 128
    return {
        "hidden_states": random.normal(size.batch, config.in_channels, size.height, size.width),
        "encoder_hidden_states": random.normal(size.batch, size.text, config.caption_channels),
        "timestep": random.whole(0, 1000, 1).expand(size.batch),
        "encoder_attention_mask": random.mask(size.batch, size.text),
        "added_cond_kwargs": {
            "resolution": random.normal(size.batch, 2) if micro else None,
            "aspect_ratio": random.normal(size.batch, 1) if micro else None,
        },
    }


def hunyuan(config: Any, size: Size, random: Random) -> dict[str, Any]:
    styled = config.use_style_cond_and_image_meta_size
    tokens = (size.height // config.patch_size) * (size.width // config.patch_size)
    return {
        "hidden_states": random.normal(size.batch, config.in_channels, size.height, size.width),
        "timestep": random.whole(0, 1000, 1).to(random.dtype).expand(size.batch),
        "encoder_hidden_states": random.normal(size.batch, config.text_len, config.cross_attention_dim),
        "text_embedding_mask": random.mask(size.batch, config.text_len),
        "encoder_hidden_states_t5": random.normal(size.batch, config.text_len_t5, config.cross_attention_dim_t5),
        "text_embedding_mask_t5": random.mask(size.batch, config.text_len_t5),
        "image_meta_size": random.whole(0, 1024, size.batch, 6).to(random.dtype) if styled else None,
        "style": torch.zeros(size.batch, dtype=torch.long) if styled else None,
        "image_rotary_emb": random.rotation(tokens, config.attention_head_dim),
    }


def dit(config: Any, size: Size, random: Random) -> dict[str, Any]:
    return {
        "hidden_states": random.normal(size.batch, config.in_channels, size.height, size.width),
        "timestep": random.whole(0, 1000, 1).expand(size.batch),
        "class_labels": random.whole(0, config.num_embeds_ada_norm, size.batch),
    }


def sd3(config: Any, size: Size, random: Random) -> dict[str, Any]:
    return {
        "hidden_states": random.normal(size.batch, config.in_channels, size.height, size.width),
        "encoder_hidden_states": random.normal(size.batch, size.text, config.joint_attention_dim),
        "pooled_projections": random.normal(size.batch, config.pooled_projection_dim),
        "timestep": random.whole(0, 1000, 1).to(random.dtype).expand(size.batch),
    }


def flux(config: Any, size: Size, random: Random) -> dict[str, Any]:
    rows, columns = size.height // 2, size.width // 2
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(float(rows)), torch.arange(float(columns)))
    return {
        "hidden_states": random.normal(size.batch, rows * columns, config.in_channels),
        "encoder_hidden_states": random.normal(size.batch, size.text, config.joint_attention_dim),
        "pooled_projections": random.normal(size.batch, config.pooled_projection_dim),
        "timestep": (random.whole(0, 1000, 1) / 1000).to(random.dtype).expand(size.batch),
        "img_ids": places.to(random.dtype),
        "txt_ids": torch.zeros(size.text, 3, dtype=random.dtype),
        "guidance": torch.full((size.batch,), 3.5) if config.guidance_embeds else None,
    }


def sana(config: Any, size: Size, random: Random) -> dict[str, Any]:
    return {
        "hidden_states": random.normal(size.batch, config.in_channels, size.height, size.width),
        "encoder_hidden_states": random.normal(size.batch, size.text, config.caption_channels),
        "timestep": random.whole(0, 1000, 1).expand(size.batch),
        "encoder_attention_mask": random.mask(size.batch, size.text),
        "guidance": torch.full((size.batch,), 0.45) if config.guidance_embeds else None,
    }


def lumina2(config: Any, size: Size, random: Random) -> dict[str, Any]:
    return {
        "hidden_states": random.normal(size.batch, config.in_channels, size.height, size.width),
        "timestep": (random.whole(0, 1000, 1) / 1000).to(random.dtype).expand(size.batch),
        "encoder_hidden_states": random.normal(size.batch, size.text, config.cap_feat_dim),
        "encoder_attention_mask": random.mask(size.batch, size.text),
    }


def auraflow(config: Any, size: Size, random: Random) -> dict[str, Any]:
    return {
        "hidden_states": random.normal(size.batch, config.in_channels, size.height, size.width),
        "encoder_hidden_states": random.normal(size.batch, size.text, config.joint_attention_dim),
        "timestep": (random.whole(0, 1000, 1) / 1000).to(random.dtype).expand(size.batch),
    }


def cogvideox(config: Any, size: Size, random: Random) -> dict[str, Any]:
    patch, thick = config.patch_size, config.patch_size_t or 1
    frames = size.frames + -size.frames % thick
    tokens = (frames // thick) * (size.height // patch) * (size.width // patch)
    return {
        "hidden_states": random.normal(size.batch, frames, config.in_channels, size.height, size.width),
        "encoder_hidden_states": random.normal(size.batch, config.max_text_seq_length, config.text_embed_dim),
        "timestep": random.whole(0, 1000, 1).expand(size.batch),
        "ofs": torch.full((1,), 2.0, dtype=random.dtype) if config.ofs_embed_dim else None,
        "image_rotary_emb": random.rotation(tokens, config.attention_head_dim)
        if config.use_rotary_positional_embeddings
        else None,
    }


def wan(config: Any, size: Size, random: Random) -> dict[str, Any]:
    return {
        "hidden_states": random.normal(size.batch, config.in_channels, size.frames, size.height, size.width),
        "timestep": random.whole(0, 1000, 1).expand(size.batch),
        "encoder_hidden_states": random.normal(size.batch, size.text, config.text_dim),
        "encoder_hidden_states_image": random.normal(size.batch, 257, config.image_dim) if config.image_dim else None,
    }


def ltx(config: Any, size: Size, random: Random) -> dict[str, Any]:
    tokens = size.frames * size.height * size.width
    return {
        "hidden_states": random.normal(size.batch, tokens, config.in_channels),
        "encoder_hidden_states": random.normal(size.batch, size.text, config.caption_channels),
        "timestep": random.whole(0, 1000, 1).expand(size.batch),
        "encoder_attention_mask": random.mask(size.batch, size.text),
        "num_frames": size.frames,
        "height": size.height,
        "width": size.width,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }
