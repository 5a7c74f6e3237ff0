"""Replacements for methods of diffusers' models whose own code ``torch.export`` cannot record for every size.

Each returns what the original returns. The table of families says which methods are replaced while a model is captured.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import MethodType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel, Lumina2Transformer2DModel
    from diffusers.models.embeddings import CogVideoXPatchEmbed, PatchEmbed
    from diffusers.models.transformers.transformer_lumina2 import Lumina2RotaryPosEmbed

Method = Callable[..., object]


@contextlib.contextmanager
def methods_replaced(model: nn.Module, rewrites: Mapping[str, Method]) -> Iterator[None]:
    """Context in which methods of ``model``'s modules are replaced.

    Args:
        model: any module.
        rewrites: the replacing functions, by ``"Class.method"``.
    """
    replaced = []
    for module in model.modules():
        for key, method in rewrites.items():
            name, _, attribute = key.rpartition(".")
            if type(module).__name__ == name:
                vars(module)[attribute] = MethodType(method, module)
                replaced.append((module, attribute))
    try:
        yield
    finally:
        for module, attribute in replaced:
            del vars(module)[attribute]


def _unpatchify(x: Tensor, rows: int, columns: int, patch: int) -> Tensor:
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
    return (_unpatchify(x, rows, columns, self.patch_size),)


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


def lumina2(
    self: "Lumina2Transformer2DModel",
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor,
    attention_kwargs: dict[str, object] | None = None,
    return_dict: bool = False,
) -> tuple[Tensor]:
    """Replaces ``Lumina2Transformer2DModel.forward``, which packs text and image by lengths that it reads from the
    mask.

    Here every row of the batch has the greatest possible length, and the places after its image are masked.
    """
    patch, text = self.config.patch_size, encoder_hidden_states.shape[1]
    rows, columns = (size // patch for size in hidden_states.shape[-2:])
    patches = rows * columns
    condition, caption = self.time_caption_embed(hidden_states, timestep, encoder_hidden_states)

    # for every place of the sequence: whether it is text, image or padding, and its row and column in the image
    length = encoder_attention_mask.sum(1, keepdim=True)
    place = torch.arange(text + patches, device=hidden_states.device)[None]
    is_text, is_used = place < length, place < length + patches
    index = (place - length).clamp(0, patches - 1)
    nowhere = torch.zeros_like(index)
    positions = torch.stack(
        [
            torch.where(is_text, place, length),
            torch.where(is_text, nowhere, index // columns),
            torch.where(is_text, nowhere, index % columns),
        ],
        -1,
    )
    rotation = _rotation(self.rope_embedder, positions)
    of_image = (length + torch.arange(patches, device=length.device))[..., None]

    image = hidden_states.unflatten(2, (rows, patch)).unflatten(4, (columns, patch))
    image = self.x_embedder(image.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))
    for layer in self.context_refiner:
        caption = layer(caption, encoder_attention_mask, rotation[:, :text])
    of_image_rotation = rotation.gather(1, of_image.expand(-1, -1, rotation.shape[-1]))
    for layer in self.noise_refiner:
        image = layer(image, None, of_image_rotation, condition)

    width = image.shape[-1]
    captions = caption[:, place[0].clamp(max=text - 1)]
    images = image.gather(1, index[..., None].expand(-1, -1, width))
    x = torch.where(is_text[..., None], captions, torch.where(is_used[..., None], images, 0.0))
    for layer in self.layers:
        x = layer(x, is_used, rotation, condition)
    x = self.norm_out(x, condition)
    x = x.gather(1, of_image.expand(-1, -1, x.shape[-1]))
    return (_unpatchify(x, rows, columns, patch),)


def _rotation(embedder: "Lumina2RotaryPosEmbed", positions: Tensor) -> Tensor:
    """Complex rotary embeddings of positions (batch, places, axes), computed instead of looked up in a table."""
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    parts = [
        get_1d_rotary_pos_embed(
            dim, positions[..., axis].flatten(), theta=embedder.theta, freqs_dtype=torch.float64
        ).unflatten(0, positions.shape[:2])
        for axis, dim in enumerate(embedder.axes_dim)
    ]
    return torch.cat(parts, -1)
