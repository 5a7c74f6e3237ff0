"""Rewritten methods that embed conditions: time, guidance, prior tokens, reference videos."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import GlmImageTransformer2DModel, WanAnimateTransformer3DModel
    from diffusers.models.transformers.transformer_chroma import ChromaCombinedTimestepTextProjEmbeddings


def chroma_times(self: "ChromaCombinedTimestepTextProjEmbeddings", timestep: Tensor) -> Tensor:
    """Replaces ``ChromaCombinedTimestepTextProjEmbeddings.forward``, which makes a Python list as long as the batch."""
    batch, count = timestep.shape[0], self.mod_proj.shape[0]
    times = self.time_proj(timestep).to(timestep.dtype)
    guidance = self.guidance_proj(torch.zeros_like(timestep)).to(timestep.dtype)
    places = self.mod_proj.to(times).expand(batch, -1, -1)
    of_image = torch.cat([times, guidance], 1)[:, None].expand(-1, count, -1)
    return torch.cat([of_image, places], -1).to(timestep.dtype)


def glm_image(
    self: "GlmImageTransformer2DModel",
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    prior_token_id: Tensor,
    prior_token_drop: Tensor,
    timestep: Tensor,
    target_size: Tensor,
    crop_coords: Tensor,
    attention_kwargs: dict[str, object] | None = None,
    return_dict: bool = False,
    attention_mask: Tensor | None = None,
    kv_caches: None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor]:
    """Replaces ``GlmImageTransformer2DModel.forward``, which selects the prior tokens that it drops by a mask."""
    rotation = self.rope(hidden_states) if image_rotary_emb is None else image_rotary_emb
    rows, columns = (size // self.config.patch_size for size in hidden_states.shape[-2:])
    prior = self.prior_token_embedding(prior_token_id)
    prior = self.prior_projector(torch.where(prior_token_drop[..., None], prior * 0.0, prior))
    x = self.image_projector(hidden_states) + prior
    text = self.glyph_projector(encoder_hidden_states)
    condition = self.time_condition_embed(timestep, target_size, crop_coords, x.dtype)
    for block in self.transformer_blocks:
        x, text = block(x, text, condition, rotation, attention_mask, attention_kwargs)
    x = self.proj_out(self.norm_out(x, condition))
    patch = self.config.patch_size
    x = x.unflatten(1, (rows, columns)).unflatten(-1, (-1, patch, patch))
    return (x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3),)


def wan_animate(
    self: "WanAnimateTransformer3DModel",
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_image: Tensor | None = None,
    pose_hidden_states: Tensor | None = None,
    face_pixel_values: Tensor | None = None,
    motion_encode_batch_size: int | None = None,
    return_dict: bool = False,
    attention_kwargs: dict[str, object] | None = None,
) -> tuple[Tensor]:
    """Replaces ``WanAnimateTransformer3DModel.forward``, which encodes faces in batches of ``motion_encode_batch_size``,
    as many as the video has.

    Here all faces are one batch, which takes more memory: at 512 px some 32 MB a frame and byte of the type.
    """
    found: tuple[Tensor] = type(self).forward(
        self,
        hidden_states,
        timestep,
        encoder_hidden_states,
        encoder_hidden_states_image,
        pose_hidden_states,
        face_pixel_values,
        motion_encode_batch_size=_ONE_BATCH,
        return_dict=False,
        attention_kwargs=attention_kwargs,
    )
    return found


_ONE_BATCH = 2**31 - 1
"""More faces than any video has."""
