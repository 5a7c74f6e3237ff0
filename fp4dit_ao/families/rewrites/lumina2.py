"""Rewritten method of Lumina 2, which packs texts of several lengths and images into one sequence."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fp4dit_ao.families.rewrites.patches import unpatchify
from fp4dit_ao.families.rewrites.positions import rotation_of

if TYPE_CHECKING:
    from diffusers import Lumina2Transformer2DModel


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
    rotation = rotation_of(self.rope_embedder, positions)
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
    return (unpatchify(x, rows, columns, patch),)
