"""Rewritten methods of Bria Fibo 2."""

from typing import TYPE_CHECKING, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4dit_ao.families.rewrites.positions import rotation_of_places

if TYPE_CHECKING:
    from diffusers import BriaFibo2Transformer2DModel

_Length = TypeVar("_Length", int, Tensor)


def bria_fibo2(
    self: "BriaFibo2Transformer2DModel",
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor | None = None,
    context_latents: list[Tensor] | None = None,
    return_dict: bool = False,
) -> tuple[Tensor]:
    """Replaces ``BriaFibo2Transformer2DModel.forward``, which makes Python lists as long as the batch, and reads the lengths
    of prompts from their mask.

    Here the number of gist tokens is an expression of the text's length. With a mask it is the greatest of all lengths, and
    what a prompt has no use for is masked.
    """
    config, patch, device = self.config, self.config.patch_size, hidden_states.device
    batch, channels, height, width = hidden_states.shape
    rows, columns = height // patch, width // patch
    noisy, clean = self.t_embedder(timestep * config.t_scale), self.t_embedder(torch.zeros_like(timestep))

    images = [hidden_states, *(context_latents or ())]
    places = [
        self.create_coordinate_grid(
            (1, image.shape[2] // patch, image.shape[3] // patch), (config.max_num_gist_tokens + plane, 0, 0), device
        ).flatten(0, 2)
        for plane, image in enumerate(images, 1)
    ]
    x = self.x_embedder(torch.cat([F.pixel_unshuffle(image, patch).flatten(2).mT for image in images], dim=1))
    image_rotation = rotation_of_places(self.rope_embedder, torch.cat(places))[None]
    is_noisy = torch.arange(x.shape[1], device=device) < rows * columns
    for block in self.noise_refiner:
        noise = is_noisy.long().expand(batch, -1) if context_latents else None
        x = block(x, None, image_rotation, noisy, noise, noisy, clean)

    is_gist = _gist_mask(self, encoder_attention_mask)
    gists = _gists(self, encoder_hidden_states.shape[2]) if is_gist is None else is_gist.shape[1]
    number = torch.arange(gists, device=device)
    gist = self.perceiver.latent_queries.index_select(0, number).expand(batch, -1, -1)
    for layer in self.perceiver.layers:
        gist = layer(gist, encoder_hidden_states[:, 0], encoder_attention_mask, is_gist)

    zero = torch.zeros_like(number)
    gist_rotation = rotation_of_places(self.rope_embedder, torch.stack([number + 1, zero, zero], -1))[None]
    rotation = torch.cat([gist_rotation, image_rotation], 1)
    noise = torch.cat([zero, is_noisy.long()]).expand(batch, -1)
    mask = None if is_gist is None else torch.cat([is_gist, is_gist.new_ones(x.shape[:2])], 1)
    x = torch.cat([self.perceiver.norm_out(gist), x], 1)
    bundles = {layer: index for index, layer in enumerate(config.injection_layer_ids, 1)}
    for index, block in enumerate(self.layers):
        text = encoder_hidden_states[:, bundles[index]] if index in bundles else None
        x = block(x, mask, rotation, None, noise, noisy, clean, text, encoder_attention_mask)
    x = self.final_layer(x.narrow(1, gists, rows * columns), c=noisy)
    x = x.reshape(batch, rows, columns, channels, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return (x.reshape(batch, channels, height, width),)


def _gists(model: "BriaFibo2Transformer2DModel", text: int) -> int:
    """Number of gist tokens for a text of so many tokens, which may be a symbol."""
    config = model.config
    length = torch.sym_min(torch.sym_max(text, config.gist_min_text_len), config.gist_max_text_len)
    count: int = torch.sym_min(_in_steps(model, length), config.max_num_gist_tokens)
    return count


def _gist_mask(model: "BriaFibo2Transformer2DModel", mask: Tensor | None) -> Tensor | None:
    """Which gist tokens each row has, of as many as there may be; None if all rows have as many as their text asks for."""
    if mask is None:
        return None
    config = model.config
    lengths = mask.sum(1).clamp(config.gist_min_text_len, config.gist_max_text_len)
    counts = _in_steps(model, lengths).clamp(max=config.max_num_gist_tokens)
    return torch.arange(config.max_num_gist_tokens, device=mask.device) < counts[:, None]


def _in_steps(model: "BriaFibo2Transformer2DModel", length: _Length) -> _Length:
    """Gist tokens between the least and the greatest number, as ``length`` lies between its own, rounded up to whole steps."""
    config = model.config
    span = config.gist_max_text_len - config.gist_min_text_len
    more = config.max_num_gist_tokens - config.min_num_gist_tokens
    step = span * config.gist_step
    wanted = config.min_num_gist_tokens * span + (length - config.gist_min_text_len) * more
    return (wanted + step - 1) // step * config.gist_step
