"""Rewritten methods of Qwen-Image, whose positions follow from Python lists of sizes and, in version 2.1, from a mask."""

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import QwenImage21Transformer2DModel, QwenImageTransformer2DModel


def qwen_image(
    self: "QwenImageTransformer2DModel",
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    img_shapes: Sequence[Sequence[Sequence[int]]] | None = None,
    guidance: Tensor | None = None,
    attention_kwargs: dict[str, object] | None = None,
    controlnet_block_samples: Sequence[Tensor] | None = None,
    additional_t_cond: Tensor | None = None,
    return_dict: bool = False,
) -> tuple[Tensor]:
    """Replaces ``QwenImageTransformer2DModel.forward``, which marks the tokens of reference images, where these have a
    time of their own (``zero_cond_t``), in a Python list as long as there are tokens."""
    if not self.zero_cond_t:
        found: tuple[Tensor] = type(self).forward(
            self, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, timestep, img_shapes, guidance,
            attention_kwargs=attention_kwargs, controlnet_block_samples=controlnet_block_samples,
            additional_t_cond=additional_t_cond, return_dict=False,
        )  # fmt: skip
        return found
    assert timestep is not None and img_shapes is not None
    x, text = self.img_in(hidden_states), self.txt_in(self.txt_norm(encoder_hidden_states))
    is_reference = (torch.arange(x.shape[1], device=x.device) >= math.prod(img_shapes[0][0])).int()[None]
    mask = None if encoder_hidden_states_mask is None else encoder_hidden_states_mask.bool()
    condition = self.time_text_embed(torch.cat([timestep, timestep * 0]).to(x.dtype), x, additional_t_cond)
    rotation = self.pos_embed(img_shapes, max_txt_seq_len=text.shape[1], device=x.device)
    for i, block in enumerate(self.transformer_blocks):
        text, x = block(x, text, mask, condition, rotation, attention_kwargs, is_reference)
        if controlnet_block_samples is not None:
            x = (
                x
                + controlnet_block_samples[i // math.ceil(len(self.transformer_blocks) / len(controlnet_block_samples))]
            )
    return (self.proj_out(self.norm_out(x, condition.chunk(2)[0])),)


def qwen_image21(
    self: "QwenImage21Transformer2DModel",
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    img_shapes: Sequence[Sequence[Sequence[int]]],
    img_mask: Tensor,
    encoder_hidden_states_mask: Tensor | None = None,
    attention_kwargs: dict[str, object] | None = None,
    kv_cache: None = None,
    kv_cache_mode: None = None,
    return_dict: bool = False,
) -> tuple[Tensor]:
    """Replaces ``QwenImage21Transformer2DModel.forward``, which reads from a mask where images stand between texts, and
    attends one such part after the other.

    Here all is computed from the mask, for sequences as long as the sizes of the images say, and attention is one masked
    product of all tokens: up to twice the work for many references, little more for none.
    """
    x, text = self.img_in(hidden_states), self.txt_in(encoder_hidden_states)
    shapes, device = img_shapes[0], x.device
    ends = list(itertools.accumulate(math.prod(shape) for shape in shapes))
    is_slot = img_mask[0].bool()
    length = is_slot.shape[0] - ends[-1] // _TOKENS_A_SLOT + ends[-1]
    place = torch.arange(length, device=device)
    source = torch.searchsorted(torch.where(is_slot, _TOKENS_A_SLOT, 1).cumsum(0), place, right=True)
    is_image = is_slot[source]
    before = is_image.cumsum(0) - is_image.long()  # image tokens in front of each place
    source = source.clamp(max=text.shape[1] - 1)
    joint = torch.where(is_image[:, None], x[:, before.clamp(max=x.shape[1] - 1)], text[:, source])

    over = [before >= end for end in ends]
    block = sum(passed.long() for passed in over[:-1]) + torch.zeros_like(place)
    is_target = is_image if len(ends) == 1 else is_image & over[-2]
    rotation = _rotation(self.pos_embed.freqs, shapes, [0, *ends], place - before, before, is_image)
    condition_mask = None
    timestep = timestep.to(x.dtype)
    if self.config.causal_condition:
        timestep, condition_mask = torch.cat([timestep, timestep.new_zeros(1)]), is_target
    condition = self.time_text_embed(timestep, x)
    modulation = self.modulation(condition)

    is_one_image = is_image[:, None] & is_image & (block[:, None] == block)
    mask = ((place[:, None] >= place) | is_one_image)[None, None]
    if encoder_hidden_states_mask is not None:
        mask = mask & (is_image | encoder_hidden_states_mask.bool()[:, source])[:, None, None]
    for layer in self.transformer_blocks:
        joint = layer(joint, modulation, rotation, attention_mask=mask, target_token_mask=condition_mask)
    return (self.proj_out(self.norm_out(joint, condition, condition_mask)),)


_TOKENS_A_SLOT = 4
"""Tokens of an image, two by two, that one place of the text encoder's sequence stands for."""


def _rotation(
    tables: Sequence[Tensor],
    shapes: Sequence[Sequence[int]],
    bounds: Sequence[int],
    texts: Tensor,
    images: Tensor,
    is_image: Tensor,
) -> Tensor:
    """Complex rotary embeddings of a sequence of texts and images.

    Args:
        tables: embeddings of positions, for each axis; negative ones are counted from the end.
        shapes: frames, rows and columns of each image.
        bounds: image tokens in front of each image, and of all.
        texts: text tokens in front of each place.
        images: image tokens in front of each place.
        is_image: whether each place is an image's.
    """
    first = texts
    for (_, rows, columns), end in zip(shapes, bounds[1:], strict=True):
        first = first + (images >= end).long() * torch.sym_max(rows, columns)
    row, column = first, first
    for (_, rows, columns), start, end in zip(shapes, bounds, bounds[1:], strict=False):
        inside, offset = is_image & (images >= start) & (images < end), images - start
        row = torch.where(inside, offset // columns - (rows - rows // 2), row)
        column = torch.where(inside, offset % columns - (columns - columns // 2), column)
    indices = (first, row, column)
    return torch.cat([table.to(index.device)[index] for table, index in zip(tables, indices, strict=True)], -1)
