"""Small models that denoise videos, some of them with sound."""

from typing import Any

import torch

from benchmarks.small_transformers.entry import AXES, WIDE, Small, grid, step, video
from fp4dit_ao.families.sample_inputs import Random


def _anyflow(r: Random) -> dict[str, Any]:
    """Frames before channels, and a step of its own for every frame."""
    return video(r, 4) | {
        "hidden_states": r.normal(2, 4, 4, 8, 8),
        "timestep": torch.full((2, 4), 500.0),
        "r_timestep": torch.full((2, 4), 250.0),
    }


def _consis(r: Random) -> dict[str, Any]:
    return video(r, 4) | {
        "hidden_states": r.normal(2, 1, 4, 8, 8),
        "id_vit_hidden": [r.normal(2, 4, 64)],
        "id_cond": r.normal(2, 64),
    }


def _cosmos(r: Random) -> dict[str, Any]:
    return video(r, 4) | {"attention_mask": torch.ones(2, 8), "fps": 30}


def _cosmos3(r: Random) -> dict[str, Any]:
    """One sequence: four words, then a frame of 16 patches."""
    places = torch.arange(4, 20)
    return {
        "input_ids": r.whole(0, 64, 4),
        "text_indexes": torch.arange(4),
        "position_ids": torch.cat([torch.arange(4).expand(3, 4), grid(1, 4, 4).long().T + 4], 1),
        "und_len": 4,
        "sequence_length": 20,
        "vision_tokens": [r.normal(1, 16, 1, 4, 4)],
        "vision_token_shapes": [(1, 4, 4)],
        "vision_sequence_indexes": places,
        "vision_mse_loss_indexes": places,
        "vision_timesteps": torch.full((16,), 500.0),
        "vision_noisy_frame_indexes": [torch.tensor([0])],
    }


def _helios(r: Random) -> dict[str, Any]:
    history = {
        f"latents_history_{length}": r.normal(2, 4, frames, 8, 8)
        for length, frames in (("short", 1), ("mid", 1), ("long", 4))
    }
    indices = {f"indices_{name}": torch.ones(2, x.shape[2]) for name, x in history.items()}
    return video(r, 4) | {"indices_hidden_states": torch.ones(2, 2)} | indices | history


def _hunyuan(r: Random) -> dict[str, Any]:
    return video(r, 4) | {
        "hidden_states": r.normal(2, 4, 2, 4, 4),
        "pooled_projections": r.normal(2, 64),
        "encoder_attention_mask": r.mask(2, 8),
        "guidance": torch.full((2,), 6000.0),
    }


def _hunyuan15(r: Random) -> dict[str, Any]:
    return video(r, 4) | {
        "hidden_states": r.normal(2, 4, 2, 4, 4),
        "timestep": step(r).float(),
        "encoder_attention_mask": r.mask(2, 8),
        "encoder_hidden_states_2": r.normal(2, 4, 64),
        "encoder_attention_mask_2": r.mask(2, 4),
        "image_embeds": r.normal(2, 3, 64),
    }


def _framepack(r: Random) -> dict[str, Any]:
    return _hunyuan(r) | {
        "hidden_states": r.normal(2, 4, 3, 4, 4),
        "image_embeds": r.normal(2, 3, 64),
        "indices_latents": torch.arange(3.0),
        "latents_clean": r.normal(2, 4, 2, 4, 4),
        "indices_latents_clean": torch.arange(2.0),
        "latents_history_2x": r.normal(2, 4, 2, 4, 4),
        "indices_latents_history_2x": torch.arange(2.0),
        "latents_history_4x": r.normal(2, 4, 8, 4, 4),
        "indices_latents_history_4x": torch.arange(8.0),
    }


def _kandinsky5(r: Random) -> dict[str, Any]:
    return {
        "hidden_states": r.normal(2, 2, 8, 8, 16),  # channels last
        "encoder_hidden_states": r.normal(2, 8, 64),
        "timestep": step(r),
        "pooled_projections": r.normal(2, 64),
        "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)],
        "text_rope_pos": torch.arange(8),
    }


def _kandinsky6(r: Random) -> dict[str, Any]:
    return {
        "hidden_states": r.normal(2, 2, 8, 8, 33),  # the latent, what it is conditioned on, and a mask
        "encoder_hidden_states": r.normal(2, 8, 64),
        "pooled_projections": r.normal(2, 64),
        "timestep": step(r),
        "audio_hidden_states": r.normal(2, 6, 32),
    }


def _ltx2(r: Random) -> dict[str, Any]:
    return {
        "hidden_states": r.normal(2, 32, 32),
        "audio_hidden_states": r.normal(2, 6, 32),
        "encoder_hidden_states": r.normal(2, 8, 64),
        "audio_encoder_hidden_states": r.normal(2, 8, 64),
        "timestep": step(r),
        "encoder_attention_mask": r.mask(2, 8),
        "num_frames": 2,
        "height": 4,
        "width": 4,
        "audio_num_frames": 6,
        "fps": 25.0,
    }


def _refiner(r: Random) -> dict[str, Any]:
    angles = torch.rand(2, 16, 64)
    return {
        "hidden_states": r.normal(2, 16, 32),
        "encoder_hidden_states": r.normal(2, 8, 64),
        "timestep": step(r)[:, None].expand(2, 16),
        "video_rotary_emb": (angles.cos(), angles.sin()),
        "encoder_attention_mask": r.mask(2, 8),
    }


def _minimax(r: Random) -> dict[str, Any]:
    """One sequence: 4 words, 6 places of sound and 8 patches of a video."""
    tags = torch.tensor([1] * 4 + [2] * 6 + [0] * 8)
    places = torch.arange(18.0)
    return {
        "hidden_states": r.normal(2, 8, 16),
        "audio_hidden_states": r.normal(2, 6, 16),
        "encoder_hidden_states": r.normal(2, 4, 64),
        "timestep": torch.tensor([0.7, 0.3]),
        "timestep_indices": (tags == 2).long(),
        "token_tags": tags,
        "position_ids": torch.stack([places, places % 4, places % 2], 1),
        "video_indices": torch.arange(10, 18),
        "audio_indices": torch.arange(4, 10),
        "text_indices": torch.arange(4),
    }


def _sana_wm(r: Random) -> dict[str, Any]:
    """Four latents of a camera that stands still, each with a step of its own."""
    camera = torch.cat([torch.eye(4).flatten(), torch.tensor([4.0, 4.0, 2.0, 2.0])])
    return {
        "hidden_states": r.normal(2, 16, 4, 4, 4),
        "timestep": step(r)[:, None, None].expand(2, 1, 4),
        "encoder_hidden_states": r.normal(2, 1, 8, 64),
        "encoder_attention_mask": r.mask(2, 8),
        "camera_conditions": camera.expand(2, 4, 20),
        "chunk_plucker": r.normal(2, 48, 4, 4, 4),
    }


def _animate(r: Random) -> dict[str, Any]:
    return {
        "hidden_states": r.normal(2, 12, 3, 8, 8),
        "timestep": step(r),
        "encoder_hidden_states": r.normal(2, 8, 64),
        "encoder_hidden_states_image": r.normal(2, 4, 64),
        "pose_hidden_states": r.normal(2, 4, 2, 8, 8),
        "face_pixel_values": r.normal(2, 3, 5, 16, 16),
    }


def _animate2(r: Random) -> dict[str, Any]:
    """The pass over a reference video that fills the cache; a later pass needs a filled one."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return {
        "hidden_states": [r.normal(16, 2, 4, 4)],
        "timestep": torch.ones(1),
        "encoder_hidden_states": [r.normal(8, 64)],
        "condition_latents": [r.normal(20, 2, 4, 4)],
        "encoder_hidden_states_image": r.normal(1, 4, 1280),
        "kv_cache": WanAnimate2KVCache(1),
        "kv_cache_mode": "extract",
        "seq_len": 8,
        "offset_grid_sizes": torch.tensor([[2, 2, 2]]),
    }


_WAN = WIDE | {
    "in_channels": 4, "out_channels": 4, "text_dim": 64, "freq_dim": 64, "ffn_dim": 128, "num_layers": 1,
    "cross_attn_norm": True,
}  # fmt: skip
_ANYFLOW = _WAN | {"rope_max_seq_len": 32, "gate_value": 0.25, "deltatime_type": "r"}
_HUNYUAN = WIDE | {
    "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_refiner_layers": 1, "mlp_ratio": 2.0, "text_embed_dim": 64,
    "rope_axes_dim": AXES,
}  # fmt: skip
_HUNYUAN_VIDEO = _HUNYUAN | {"num_single_layers": 1, "guidance_embeds": True, "pooled_projection_dim": 64}
_KANDINSKY = {
    "in_visual_dim": 16, "out_visual_dim": 16, "time_dim": 64, "model_dim": 64, "ff_dim": 128, "num_visual_blocks": 1,
    "axes_dims": AXES,
}  # fmt: skip
_LTX2 = WIDE | {
    "in_channels": 32, "out_channels": 32, "cross_attention_dim": 64, "audio_in_channels": 32, "audio_out_channels": 32,
    "audio_num_attention_heads": 2, "audio_attention_head_dim": 32, "audio_cross_attention_dim": 64, "num_layers": 1,
    "caption_channels": 64, "rope_double_precision": False,
}  # fmt: skip

VIDEO: dict[str, Small] = {
    "AllegroTransformer3DModel": Small(WIDE | {
        "in_channels": 4, "out_channels": 4, "num_layers": 1, "cross_attention_dim": 64, "sample_width": 8, "sample_height": 8,
        "sample_frames": 8, "caption_channels": 64,
    }, lambda r: video(r, 4)),
    "AnyFlowTransformer3DModel": Small(_ANYFLOW, _anyflow),
    "AnyFlowFARTransformer3DModel": Small(
        _ANYFLOW | {"compressed_patch_size": (1, 4, 4), "full_chunk_limit": 3},
        lambda r: _anyflow(r) | {"chunk_partition": [2, 2]},
    ),
    "ChronoEditTransformer3DModel": Small(_WAN | {"rope_max_seq_len": 64}, lambda r: video(r, 4)),
    "ConsisIDTransformer3DModel": Small({
        "num_attention_heads": 3, "attention_head_dim": 32, "in_channels": 4, "out_channels": 4, "time_embed_dim": 64,
        "text_embed_dim": 64, "num_layers": 1, "sample_width": 8, "sample_height": 8,
        "sample_frames": 8, "max_text_seq_length": 8, "is_train_face": True, "cross_attn_interval": 1,
        "cross_attn_dim_head": 32, "cross_attn_num_heads": 2, "LFE_id_dim": 64, "LFE_vit_dim": 64, "LFE_depth": 1,
        "LFE_dim_head": 32, "LFE_num_heads": 2, "LFE_num_id_token": 1, "LFE_num_querie": 4, "LFE_output_dim": 64,
        "LFE_ff_mult": 1, "LFE_num_scale": 1,
    }, _consis),
    "CosmosTransformer3DModel": Small(WIDE | {
        "in_channels": 4, "out_channels": 4, "num_layers": 1, "mlp_ratio": 2, "text_embed_dim": 64, "adaln_lora_dim": 32,
        "max_size": (4, 32, 32), "extra_pos_embed_type": "learnable", "concat_padding_mask": False,  # it needs torchvision
    }, _cosmos),
    "Cosmos3OmniTransformer": Small({
        "head_dim": 32, "hidden_size": 64, "intermediate_size": 128, "latent_channel": 16, "latent_patch_size": 1,
        "patch_latent_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1,
        "rope_axes_dim": [6, 5, 5], "vocab_size": 64,
    }, _cosmos3),
    "EasyAnimateTransformer3DModel": Small(WIDE | {
        "in_channels": 4, "out_channels": 4, "num_layers": 2, "mmdit_layers": 1, "sample_height": 60, "sample_width": 90,
        "patch_size": 2, "text_embed_dim": 64, "time_embed_dim": 64,
    }, lambda r: video(r, 4)),
    "HeliosTransformer3DModel": Small(_WAN | {"rope_dim": (12, 10, 10)}, _helios),
    "HunyuanVideoTransformer3DModel": Small(_HUNYUAN_VIDEO, _hunyuan),
    "HunyuanVideo15Transformer3DModel": Small(_HUNYUAN | {
        "patch_size": 1, "text_embed_2_dim": 64, "image_embed_dim": 64, "target_size": 16, "task_type": "t2v",
    }, _hunyuan15),
    "HunyuanVideoFramepackTransformer3DModel": Small(
        _HUNYUAN_VIDEO | {"has_image_proj": True, "image_proj_dim": 64, "has_clean_x_embedder": True}, _framepack
    ),
    "Kandinsky5Transformer3DModel": Small(
        _KANDINSKY | {"in_text_dim": 64, "in_text_dim2": 64, "num_text_blocks": 1}, _kandinsky5
    ),
    "Kandinsky6Transformer3DModel": Small(_KANDINSKY | {
        "in_text_dim": 64, "in_text_dim2": 64, "num_text_blocks": 1, "in_audio_dim": 32, "out_audio_dim": 32,
        "text_token_padding": True, "ca_rope": True, "cross_gates": True, "fix_modulation": True,
    }, _kandinsky6),
    "Kandinsky6SRTransformer3DModel": Small(
        _KANDINSKY, lambda r: {"hidden_states": r.normal(2, 2, 8, 8, 33), "timestep": step(r)}
    ),
    "LatteTransformer3DModel": Small(WIDE | {
        "in_channels": 4, "out_channels": 8, "num_layers": 1, "cross_attention_dim": 64, "caption_channels": 64,
        "sample_size": 8, "patch_size": 2, "video_length": 2, "attention_bias": True, "num_embeds_ada_norm": 1000,
        "activation_fn": "gelu-approximate", "norm_type": "ada_norm_single", "norm_elementwise_affine": False,
    }, lambda r: video(r, 4)),
    "LTX2VideoTransformer3DModel": Small(_LTX2, _ltx2),
    "MiniMaxH3Transformer3DModel": Small(WIDE | {
        "hidden_size": 64, "num_layers": 1, "num_refiner_layers": 1, "ffn_dim": 128, "in_channels": 4,
        "audio_in_channels": 16, "text_dim": 64, "freq_dim": 64, "time_embed_hidden_dim": 64, "time_embed_dim": 64,
        "rope_freq_dim": 4,
    }, _minimax),
    "MochiTransformer3DModel": Small({
        "num_attention_heads": 3, "attention_head_dim": 32, "num_layers": 2, "pooled_projection_dim": 96, "in_channels": 4,
        "text_embed_dim": 64, "time_embed_dim": 64,
    }, lambda r: video(r, 4) | {"encoder_attention_mask": r.mask(2, 8).bool()}),
    "MotifVideoTransformer3DModel": Small(WIDE | {
        "in_channels": 33, "out_channels": 16, "num_layers": 1, "num_single_layers": 1, "mlp_ratio": 2.0,
        "text_embed_dim": 64, "rope_axes_dim": AXES,
    }, lambda r: video(r, 33)),
    "SanaVideoTransformer3DModel": Small(WIDE | {
        "num_layers": 1, "num_cross_attention_heads": 2, "cross_attention_head_dim": 32, "cross_attention_dim": 64,
        "caption_channels": 64, "sample_size": 8, "rope_max_seq_len": 32,
    }, lambda r: video(r, 16)),
    "SanaWMTransformer3DModel": Small({
        "in_channels": 16, "num_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "softmax_every_n": 2,
        "linear_head_dim": 32, "caption_channels": 64, "mlp_ratio": 2.0,
    }, _sana_wm),
    "SanaWMLTX2RefinerTransformer3DModel": Small(_LTX2, _refiner),
    "SkyReelsV2Transformer3DModel": Small(_WAN | {"rope_max_seq_len": 32}, lambda r: video(r, 4)),
    "WanAnimateTransformer3DModel": Small(_WAN | {
        "in_channels": 12, "latent_channels": 4, "image_dim": 64, "motion_encoder_size": 16, "motion_style_dim": 16,
        "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16}, "motion_dim": 4, "motion_encoder_dim": 64,
        "face_encoder_hidden_dim": 64, "face_encoder_num_heads": 2, "inject_face_latents_blocks": 1,
    }, _animate),
    "WanAnimate2Transformer3DModel": Small({
        "text_len": 16, "dim": 64, "ffn_dim": 128, "freq_dim": 64, "text_dim": 64, "num_heads": 2, "num_layers": 1,
    }, _animate2),
    "WanVACETransformer3DModel": Small(
        _WAN | {"num_layers": 2, "vace_layers": [0], "vace_in_channels": 12},
        lambda r: video(r, 4) | {"control_hidden_states": r.normal(2, 12, 2, 8, 8)},
    ),
}  # fmt: skip
"""Small models by the name of their class; those of the table of families stand in ``known.py``."""
