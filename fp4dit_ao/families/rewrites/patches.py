"""Rewritten methods that cut images into patches, and put them together again."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel, HiDreamImageTransformer2DModel
    from diffusers.models.embeddings import LuminaPatchEmbed, PatchEmbed


def unpatchify(x: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    """Reshapes (batch, rows * columns, patch * patch * channels) to
    (batch, channels, rows * patch, columns * patch)."""
    x = x.unflatten(1, (rows, columns)).unflatten(-1, (patch, patch, -1))
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def patch_embed(self: "PatchEmbed", latent: Tensor) -> Tensor:
    """Replaces ``PatchEmbed.forward``, which swaps the sides of its position grid, so that a graph fits one aspect
    ratio only."""
    from diffusers.models.embeddings import get_2d_sincos_pos_embed_from_grid

    if self.pos_embed is None or self.pos_embed_max_size:
        embedded: Tensor = type(self).forward(self, latent)
        return embedded
    tokens = self.proj(latent).flatten(2).transpose(1, 2)
    sides = [
        torch.arange(size, device=latent.device, dtype=torch.float32)
        / (size / self.base_size)
        / self.interpolation_scale
        for size in (latent.shape[-2] // self.patch_size, latent.shape[-1] // self.patch_size)
    ]
    grid = torch.stack(torch.meshgrid(sides[1], sides[0], indexing="xy"))
    positions = get_2d_sincos_pos_embed_from_grid(self.pos_embed.shape[-1], grid, output_type="pt")
    return (tokens + positions.float()).to(tokens.dtype)


def lumina_patches(
    self: "LuminaPatchEmbed", x: Tensor, freqs_cis: Tensor
) -> tuple[Tensor, Tensor, list[tuple[int, int]], Tensor]:
    """Replaces ``LuminaPatchEmbed.forward``, which returns a list of sizes as long as the batch; only the first is read."""
    rows, columns = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
    patches = x.unflatten(3, (columns, self.patch_size)).unflatten(2, (rows, self.patch_size))
    tokens = self.proj(patches.permute(0, 2, 4, 1, 3, 5).flatten(3)).flatten(1, 2)
    mask = torch.ones(tokens.shape[:2], dtype=torch.int32, device=x.device)
    rotation = freqs_cis.to(x.device)[:rows, :columns].flatten(0, 1).unsqueeze(0)
    return tokens, mask, [(x.shape[2], x.shape[3])], rotation


def dit(
    self: "DiTTransformer2DModel",
    hidden_states: Tensor,
    timestep: Tensor,
    class_labels: Tensor,
    cross_attention_kwargs: dict[str, object] | None = None,
    return_dict: bool = False,
) -> tuple[Tensor]:
    """Replaces ``DiTTransformer2DModel.forward``, which computes the image's side as the square root of the number of
    tokens.

    Here height and width come from the latent, so that images need not be square.
    """
    rows, columns = (size // self.patch_size for size in hidden_states.shape[-2:])
    x = self.pos_embed(hidden_states)
    for block in self.transformer_blocks:
        x = block(x, timestep=timestep, class_labels=class_labels, cross_attention_kwargs=cross_attention_kwargs)
    condition = self.transformer_blocks[0].norm1.emb(timestep, class_labels, hidden_dtype=x.dtype)
    shift, scale = self.proj_out_1(F.silu(condition)).unsqueeze(1).chunk(2, -1)
    x = self.proj_out_2(self.norm_out(x) * (1 + scale) + shift)
    return (unpatchify(x, rows, columns, self.patch_size),)


def hidream_patches(
    self: "HiDreamImageTransformer2DModel", hidden_states: Tensor
) -> tuple[Tensor, Tensor, tuple[int, int], Tensor]:
    """Replaces ``HiDreamImageTransformer2DModel.patchify``, which pads an image that is not square to the length of the
    largest, and is captured as one or the other.

    Here the length is an expression of the sizes, and every image has a mask.
    """
    patch = self.config.patch_size
    batch, _, height, width = hidden_states.shape
    rows, columns = height // patch, width // patch
    count = rows * columns
    is_square = 1 // (1 + (height - width) ** 2)  # one or zero, without a branch
    length = self.max_seq + is_square * (count - self.max_seq)

    images = hidden_states.unflatten(2, (rows, patch)).unflatten(4, (columns, patch))
    images = images.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    images = torch.cat([images, images.new_zeros(batch, length - count, images.shape[-1])], 1)
    place = torch.arange(length, device=images.device)
    is_used = place < count
    columns_of = torch.stack([torch.zeros_like(place), place // columns, place % columns], -1)
    ids = torch.where(is_used[:, None], columns_of, 0).float()
    return images, is_used.to(images.dtype).expand(batch, -1), (rows, columns), ids.expand(batch, -1, -1)


def hidream_unpatched(
    self: "HiDreamImageTransformer2DModel", x: Tensor, img_sizes: tuple[int, int], is_training: bool
) -> Tensor:
    """Replaces ``HiDreamImageTransformer2DModel.unpatchify``, which reads the size of each image from a tensor.

    Here all images of a batch have the size that :func:`hidream_patches` returned.
    """
    rows, columns = img_sizes
    return unpatchify(x[:, : rows * columns], rows, columns, self.config.patch_size)
