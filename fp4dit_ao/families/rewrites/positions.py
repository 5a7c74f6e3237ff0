"""Rewritten methods that compute positions and their rotations."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers.models.embeddings import CogVideoXPatchEmbed
    from diffusers.models.transformers.transformer_cosmos import CosmosLearnablePositionalEmbed
    from diffusers.models.transformers.transformer_lumina2 import Lumina2RotaryPosEmbed
    from diffusers.models.transformers.transformer_omnigen import OmniGenSuScaledRotaryEmbedding
    from diffusers.models.transformers.transformer_z_image import RopeEmbedder


def cogvideox_positions(
    self: "CogVideoXPatchEmbed",
    sample_height: int,
    sample_width: int,
    sample_frames: int,
    device: torch.device | None = None,
) -> Tensor:
    """Replaces ``CogVideoXPatchEmbed._get_positional_embeddings``, which writes into a tensor's ``.data``."""
    from diffusers.models.embeddings import get_3d_sincos_pos_embed

    frames = (sample_frames - 1) // self.temporal_compression_ratio + 1
    positions = get_3d_sincos_pos_embed(
        self.embed_dim,
        (sample_width // self.patch_size, sample_height // self.patch_size),
        frames,
        self.spatial_interpolation_scale,
        self.temporal_interpolation_scale,
        device=device,
        output_type="pt",
    ).flatten(0, 1)
    text = positions.new_zeros(self.max_text_seq_length, self.embed_dim)
    # the table it stands for is float32; on their way here positions are float64
    return torch.cat([text, positions])[None]


def cosmos_positions(self: "CosmosLearnablePositionalEmbed", hidden_states: Tensor) -> Tensor:
    """Replaces ``CosmosLearnablePositionalEmbed.forward``, which takes NumPy's square root of a ratio of sizes.

    It is one over the width.
    """
    counts = [size // patch for size, patch in zip(hidden_states.shape[2:], self.patch_size, strict=True)]
    tables = [
        table[:count] for table, count in zip((self.pos_emb_t, self.pos_emb_h, self.pos_emb_w), counts, strict=True)
    ]
    embedded = tables[0][:, None, None] + tables[1][:, None] + tables[2]
    embedded = embedded.expand(hidden_states.shape[0], *embedded.shape).flatten(1, 3)
    norm = torch.linalg.vector_norm(embedded, dim=-1, keepdim=True, dtype=torch.float32)
    norm = torch.add(self.eps, norm, alpha=math.sqrt(1 / embedded.shape[-1]))
    return (embedded / norm).type_as(hidden_states)


def rotation_of(embedder: "Lumina2RotaryPosEmbed", positions: Tensor) -> Tensor:
    """Complex rotary embeddings of positions (batch, places, axes), computed instead of looked up in a table."""
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    parts = [
        get_1d_rotary_pos_embed(
            dim, positions[..., axis].flatten(), theta=embedder.theta, freqs_dtype=torch.float64
        ).unflatten(0, positions.shape[:2])
        for axis, dim in enumerate(embedder.axes_dim)
    ]
    return torch.cat(parts, -1)


def rotation_of_places(embedder: "RopeEmbedder", places: Tensor) -> Tensor:
    """Complex rotary embeddings of places (places, axes), computed instead of looked up in a table that the embedder
    keeps."""
    parts = []
    for axis, dim in enumerate(embedder.axes_dims):
        frequencies = 1.0 / (
            embedder.theta ** (torch.arange(0, dim, 2, dtype=torch.float64, device=places.device) / dim)
        )
        angles = (places[:, axis, None].double() * frequencies).float()
        parts.append(torch.polar(torch.ones_like(angles), angles))
    return torch.cat(parts, -1)


def omnigen_rotation(
    self: "OmniGenSuScaledRotaryEmbedding", hidden_states: Tensor, position_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Replaces ``OmniGenSuScaledRotaryEmbedding.forward``, which branches on the greatest position, and keeps the
    frequencies that it used."""
    device = hidden_states.device
    is_long = torch.max(position_ids) + 1 > self.original_max_position_embeddings
    long, short = (torch.tensor(x, dtype=torch.float32, device=device) for x in (self.long_factor, self.short_factor))
    exponents = torch.arange(0, self.dim, 2, dtype=torch.int64, device=device).float() / self.dim
    frequencies = 1.0 / (torch.where(is_long, long, short) * self.base**exponents)
    angles = (frequencies[None, :, None] @ position_ids[:1, None, :].float()).transpose(1, 2)
    angles = torch.cat([angles, angles], -1)[0]
    ratio = self.max_position_embeddings / self.original_max_position_embeddings
    scale = 1.0 if ratio <= 1 else math.sqrt(1 + math.log(ratio) / math.log(self.original_max_position_embeddings))
    return angles.cos() * scale, angles.sin() * scale
