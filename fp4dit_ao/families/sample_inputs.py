"""Random keyword arguments of ``forward`` for each family, with the shapes of one denoising step.

They suffice to capture a model and to quantize it with nearest rounding where no pipeline is at hand. Learned rounding
needs real calibration data: :func:`fp4dit_ao.collect_samples`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers.configuration_utils import FrozenDict


@dataclass(frozen=True)
class Size:
    """Sizes of a sample. Height, width and frames are those of the latent, before patching."""

    batch: int = 2
    height: int = 16
    width: int = 16
    frames: int = 3
    text: int = 16
    """Text tokens; ignored by families whose config fixes the text length."""


class Random:
    """Random tensors from one seeded generator.

    Args:
        seed: seed of the generator.
        dtype: type of the floating-point tensors.
    """

    def __init__(self, seed: int, dtype: torch.dtype):
        self._generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def normal(self, *shape: int) -> Tensor:
        """Normally distributed numbers."""
        return torch.randn(shape, generator=self._generator).to(self.dtype)

    def whole(self, low: int, high: int, *shape: int) -> Tensor:
        """Whole numbers in [low, high), int64."""
        return torch.randint(low, high, shape, generator=self._generator)

    def mask(self, batch: int, text: int) -> Tensor:
        """Attention mask ``(batch, text)``, int64: 1 for a prompt of random length, at least one token, then 0 for
        padding."""
        lengths = self.whole(1, text + 1, batch, 1)
        return (torch.arange(text) < lengths).long()

    def rotation(self, tokens: int, features: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of rotary embeddings, ``(tokens, features)`` each; float32, as in pipelines."""
        angles = torch.rand(tokens, features // 2, generator=self._generator).repeat_interleave(2, 1) * torch.pi
        return angles.cos(), angles.sin()


Inputs = Callable[["FrozenDict", Size, Random], dict[str, object]]
"""Makes keyword arguments of ``forward`` from a model's config, sizes and a source of random tensors."""


def pixart(config: "FrozenDict", size: Size, random: Random) -> dict[str, object]:
    """Keyword arguments of PixArt-α and PixArt-Σ; see :data:`Inputs`."""
    micro = config.use_additional_conditions
    if micro is None:
        micro = config.sample_size == 128
    return {
        "hidden_states": random.normal(size.batch, config.in_channels, size.height, size.width),
        "encoder_hidden_states": random.normal(
            size.batch,
            size.text,
            config.caption_channels or config.cross_attention_dim,  # without: text as wide as its keys
        ),
        "timestep": random.whole(0, 1000, 1).expand(size.batch),
        "encoder_attention_mask": random.mask(size.batch, size.text),
        "added_cond_kwargs": {
            "resolution": random.normal(size.batch, 2) if micro else None,
            "aspect_ratio": random.normal(size.batch, 1) if micro else None,
        },
    }


def hunyuan(config: "FrozenDict", size: Size, random: Random) -> dict[str, object]:
    """Keyword arguments of Hunyuan-DiT; see :data:`Inputs`."""
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


def dit(config: "FrozenDict", size: Size, random: Random) -> dict[str, object]:
    """Keyword arguments of DiT; see :data:`Inputs`."""
    return {
        "hidden_states": random.normal(size.batch, config.in_channels, size.height, size.width),
        "timestep": random.whole(0, 1000, 1).expand(size.batch),
        "class_labels": random.whole(0, config.num_embeds_ada_norm, size.batch),
    }


def sd3(config: "FrozenDict", size: Size, random: Random) -> dict[str, object]:
    """Keyword arguments of Stable Diffusion 3; see :data:`Inputs`."""
    return {
        "hidden_states": random.normal(size.batch, config.in_channels, size.height, size.width),
        "encoder_hidden_states": random.normal(size.batch, size.text, config.joint_attention_dim),
        "pooled_projections": random.normal(size.batch, config.pooled_projection_dim),
        "timestep": random.whole(0, 1000, 1).to(random.dtype).expand(size.batch),
    }


def flux(config: "FrozenDict", size: Size, random: Random) -> dict[str, object]:
    """Keyword arguments of FLUX.1; see :data:`Inputs`."""
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


def sana(config: "FrozenDict", size: Size, random: Random) -> dict[str, object]:
    """Keyword arguments of Sana; see :data:`Inputs`."""
    return {
        "hidden_states": random.normal(size.batch, config.in_channels, size.height, size.width),
        "encoder_hidden_states": random.normal(size.batch, size.text, config.caption_channels),
        "timestep": random.whole(0, 1000, 1).expand(size.batch),
        "encoder_attention_mask": random.mask(size.batch, size.text),
        "guidance": torch.full((size.batch,), 0.45) if config.guidance_embeds else None,
    }


def lumina2(config: "FrozenDict", size: Size, random: Random) -> dict[str, object]:
    """Keyword arguments of Lumina 2; see :data:`Inputs`."""
    return {
        "hidden_states": random.normal(size.batch, config.in_channels, size.height, size.width),
        "timestep": (random.whole(0, 1000, 1) / 1000).to(random.dtype).expand(size.batch),
        "encoder_hidden_states": random.normal(size.batch, size.text, config.cap_feat_dim),
        "encoder_attention_mask": random.mask(size.batch, size.text),
    }


def auraflow(config: "FrozenDict", size: Size, random: Random) -> dict[str, object]:
    """Keyword arguments of AuraFlow; see :data:`Inputs`."""
    return {
        "hidden_states": random.normal(size.batch, config.in_channels, size.height, size.width),
        "encoder_hidden_states": random.normal(size.batch, size.text, config.joint_attention_dim),
        "timestep": (random.whole(0, 1000, 1) / 1000).to(random.dtype).expand(size.batch),
    }


def cogvideox(config: "FrozenDict", size: Size, random: Random) -> dict[str, object]:
    """Keyword arguments of CogVideoX; see :data:`Inputs`."""
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


def wan(config: "FrozenDict", size: Size, random: Random) -> dict[str, object]:
    """Keyword arguments of Wan; see :data:`Inputs`."""
    return {
        "hidden_states": random.normal(size.batch, config.in_channels, size.frames, size.height, size.width),
        "timestep": random.whole(0, 1000, 1).expand(size.batch),
        "encoder_hidden_states": random.normal(size.batch, size.text, config.text_dim),
        "encoder_hidden_states_image": random.normal(size.batch, 257, config.image_dim) if config.image_dim else None,
    }


def ltx(config: "FrozenDict", size: Size, random: Random) -> dict[str, object]:
    """Keyword arguments of LTX-Video; see :data:`Inputs`."""
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
