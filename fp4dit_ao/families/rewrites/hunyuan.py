"""Rewritten methods of Hunyuan's models, which pack texts of several lengths row by row."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from fp4dit_ao import _compat
from fp4dit_ao.families.rewrites.masked_tokens import used_first

if TYPE_CHECKING:
    from diffusers import (
        HunyuanImageTransformer2DModel,
        HunyuanVideo15Transformer3DModel,
        HunyuanVideoFramepackTransformer3DModel,
    )


def hunyuan_video15(
    self: "HunyuanVideo15Transformer3DModel",
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor,
    timestep_r: Tensor | None = None,
    encoder_hidden_states_2: Tensor | None = None,
    encoder_attention_mask_2: Tensor | None = None,
    image_embeds: Tensor | None = None,
    attention_kwargs: dict[str, object] | None = None,
    return_dict: bool = False,
) -> tuple[Tensor]:
    """Replaces ``HunyuanVideo15Transformer3DModel.forward``, which packs two texts and an image by their masks, one row
    after the other, and branches on whether there is an image.

    Here a stable sort moves the masked tokens of each row behind the others.
    """
    assert encoder_hidden_states_2 is not None and encoder_attention_mask_2 is not None and image_embeds is not None
    sizes = _patch_counts(self.config, hidden_states)
    rotation = self.rope(hidden_states)
    condition = self.time_embed(timestep, timestep_r=timestep_r)
    x = self.x_embedder(hidden_states)

    has_image = (image_embeds != 0).any()
    image = self.image_embedder(image_embeds)
    image = torch.where(has_image, image, image * 0.0)
    texts = (
        self.context_embedder(encoder_hidden_states, timestep, encoder_attention_mask),
        self.context_embedder_2(encoder_hidden_states_2),
    )
    text, glyphs, image = (part + self.cond_type_embed.weight[kind] for kind, part in enumerate((*texts, image)))
    is_text = torch.cat([encoder_attention_mask_2, encoder_attention_mask.to(encoder_attention_mask_2)], 1).bool()
    joined = torch.where(is_text[..., None], torch.cat([glyphs, text], 1), 0.0)
    is_used = torch.cat([has_image.expand(image.shape[:2]), is_text], 1)
    tokens, is_used = used_first(torch.cat([image, joined], 1), is_used)

    for block in self.transformer_blocks:
        x, tokens = block(x, tokens, condition, is_used, rotation)
    x = self.proj_out(self.norm_out(x, condition))
    patch = (self.config.patch_size_t, self.config.patch_size, self.config.patch_size)
    return (_unpatchify(x, sizes, patch),)


def hunyuan_image(
    self: "HunyuanImageTransformer2DModel",
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor,
    timestep_r: Tensor | None = None,
    encoder_hidden_states_2: Tensor | None = None,
    encoder_attention_mask_2: Tensor | None = None,
    guidance: Tensor | None = None,
    attention_kwargs: dict[str, object] | None = None,
    return_dict: bool = False,
) -> tuple[Tensor]:
    """Replaces ``HunyuanImageTransformer2DModel.forward``, which packs two texts by their masks, one row after the
    other."""
    patch = tuple(self.config.patch_size)
    counts = [size // side for size, side in zip(hidden_states.shape[2:], patch, strict=True)]
    rotation = self.rope(hidden_states)
    is_used = encoder_attention_mask.bool()
    condition = self.time_guidance_embed(timestep, guidance=guidance, timestep_r=timestep_r)
    x = self.x_embedder(hidden_states)
    tokens = self.context_embedder(encoder_hidden_states, timestep, is_used)
    if self.context_embedder_2 is not None and encoder_hidden_states_2 is not None:
        assert encoder_attention_mask_2 is not None
        glyphs = self.context_embedder_2(encoder_hidden_states_2)
        is_used = torch.cat([encoder_attention_mask_2.bool(), is_used], 1)
        tokens, is_used = used_first(torch.cat([glyphs, tokens], 1), is_used)
    mask = torch.cat([is_used.new_ones(x.shape[:2]), is_used], 1)[:, None, None]
    for block in (*self.transformer_blocks, *self.single_transformer_blocks):
        x, tokens = block(x, tokens, condition, attention_mask=mask, image_rotary_emb=rotation)
    return (_unpatchify(self.proj_out(self.norm_out(x, condition)), counts, patch),)


def framepack(
    self: "HunyuanVideoFramepackTransformer3DModel",
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor,
    pooled_projections: Tensor,
    image_embeds: Tensor,
    indices_latents: Tensor,
    guidance: Tensor | None = None,
    latents_clean: Tensor | None = None,
    indices_latents_clean: Tensor | None = None,
    latents_history_2x: Tensor | None = None,
    indices_latents_history_2x: Tensor | None = None,
    latents_history_4x: Tensor | None = None,
    indices_latents_history_4x: Tensor | None = None,
    attention_kwargs: dict[str, object] | None = None,
    return_dict: bool = False,
) -> tuple[Tensor]:
    """Replaces ``HunyuanVideoFramepackTransformer3DModel.forward``, which cuts the text of a single prompt to the length
    that it reads from the mask, and masks those of several prompts one after the other.

    Here texts are masked, of one prompt as of several.
    """
    sizes = _patch_counts(self.config, hidden_states)
    height, width, device = *hidden_states.shape[-2:], hidden_states.device
    x = self.x_embedder(hidden_states)
    history = self.clean_x_embedder(latents_clean, latents_history_2x, latents_history_4x)
    indices = (indices_latents_clean, indices_latents_history_2x, indices_latents_history_4x)
    rotations = [None if i is None else self.rope(i, height, width, device) for i in (indices_latents, *indices)]
    x, rotation = _compat.packed_history(self, x, *history, *rotations, *sizes[1:])

    condition, _ = self.time_text_embed(timestep, pooled_projections, guidance)
    text = self.context_embedder(encoder_hidden_states, timestep, encoder_attention_mask)
    image = self.image_projection(image_embeds)
    tokens = torch.cat([image, text], 1)
    length = x.shape[1] + image.shape[1] + encoder_attention_mask.sum(1, keepdim=True)
    is_used = torch.arange(x.shape[1] + tokens.shape[1], device=device)[None] < length
    for block in (*self.transformer_blocks, *self.single_transformer_blocks):
        x, tokens = block(x, tokens, condition, is_used[:, None, None], rotation)
    x = x[:, x.shape[1] - sizes[0] * sizes[1] * sizes[2] :]
    x = self.proj_out(self.norm_out(x, condition))
    patch = (self.config.patch_size_t, self.config.patch_size, self.config.patch_size)
    return (_unpatchify(x, sizes, patch),)


class _PatchSizes(Protocol):
    patch_size_t: int
    patch_size: int


def _patch_counts(config: _PatchSizes, latent: Tensor) -> tuple[int, int, int]:
    """Patches of a latent along frames, height and width."""
    frames, height, width = latent.shape[-3:]
    return frames // config.patch_size_t, height // config.patch_size, width // config.patch_size


def _unpatchify(x: Tensor, counts: Sequence[int], patch: Sequence[int]) -> Tensor:
    """Reshapes (batch, patches, channels * pixels) to (batch, channels, …).

    Args:
        x: the patches.
        counts: number of patches along each axis.
        patch: size of a patch along each axis.
    """
    axes = len(counts)
    x = x.unflatten(1, tuple(counts)).unflatten(-1, (-1, *patch))
    x = x.permute(0, axes + 1, *(axis for i in range(axes) for axis in (i + 1, axes + 2 + i)))
    for i in range(axes):
        x = x.flatten(i + 2, i + 3)
    return x
