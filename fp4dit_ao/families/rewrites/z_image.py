"""Rewritten methods of Z-Image, which pack images and texts of several lengths into padded sequences."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fp4dit_ao.families.rewrites.positions import rotation_of_places

if TYPE_CHECKING:
    from diffusers import ZImageTransformer2DModel


def z_image_padded(
    self: "ZImageTransformer2DModel",
    feat: Tensor,
    pos_grid_size: Sequence[int],
    pos_start: Sequence[int],
    device: torch.device,
    noise_mask_val: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, int, list[int] | None]:
    """Replaces ``ZImageTransformer2DModel._pad_with_ids``, which is captured with or without padding.

    Here there may be none of it.
    """
    from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF

    length = feat.shape[0]
    padding = -length % SEQ_MULTI_OF
    positions = self.create_coordinate_grid(pos_grid_size, pos_start, device).flatten(0, 2)
    positions = torch.cat([positions, positions.new_zeros(padding, positions.shape[1])])
    padded = torch.cat([feat, feat[-1:].expand(padding, -1)])
    is_padding = torch.arange(length + padding, device=device) >= length
    noise = None if noise_mask_val is None else [noise_mask_val] * (length + padding)
    return padded, positions, is_padding, length + padding, noise


def z_image_sequence(
    self: "ZImageTransformer2DModel",
    feats: list[Tensor],
    pos_ids: list[Tensor],
    inner_pad_mask: list[Tensor],
    pad_token: Tensor,
    noise_mask: list[list[int]] | None = None,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, list[int], Tensor | None]:
    """Replaces ``ZImageTransformer2DModel._prepare_sequence``, which is captured with a mask or without, as the lengths of
    the example are equal or not.

    Here several images have a mask.
    """
    lengths = [x.shape[0] for x in feats]
    used = [torch.where(is_padding[:, None], pad_token, x) for x, is_padding in zip(feats, inner_pad_mask, strict=True)]
    rotations = [
        rotation_of_places(self.rope_embedder, ids[:length]) for ids, length in zip(pos_ids, lengths, strict=True)
    ]
    return _stacked(used), _stacked(rotations), _masks(lengths, used[0].device), lengths, None


def z_image_joined(
    self: "ZImageTransformer2DModel",
    x: Tensor,
    x_freqs: Tensor,
    x_seqlens: list[int],
    x_noise_mask: list[list[int]] | None,
    cap: Tensor,
    cap_freqs: Tensor,
    cap_seqlens: list[int],
    cap_noise_mask: list[list[int]] | None,
    siglip: Tensor | None,
    siglip_freqs: Tensor | None,
    siglip_seqlens: list[int] | None,
    siglip_noise_mask: list[list[int]] | None,
    omni_mode: bool,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Replaces ``ZImageTransformer2DModel._build_unified_sequence``; see :func:`z_image_sequence`."""
    counts = list(zip(x_seqlens, cap_seqlens, strict=True))
    sequences, rotations = (
        [torch.cat([images[i, :image], texts[i, :text]]) for i, (image, text) in enumerate(counts)]
        for images, texts in ((x, cap), (x_freqs, cap_freqs))
    )
    return _stacked(sequences), _stacked(rotations), _masks([image + text for image, text in counts], device), None


def _stacked(sequences: list[Tensor]) -> Tensor:
    """Stacks sequences, with zeros after those that are shorter."""
    longest = functools.reduce(torch.sym_max, (x.shape[0] for x in sequences))
    return torch.stack([torch.cat([x, x.new_zeros(longest - x.shape[0], *x.shape[1:])]) for x in sequences])


def _masks(lengths: list[int], device: torch.device) -> Tensor | None:
    """Masks (batch, places) of sequences of these lengths; none for a single one."""
    if len(lengths) == 1:
        return None
    places = torch.arange(functools.reduce(torch.sym_max, lengths), device=device)
    return torch.stack([places < length for length in lengths])
