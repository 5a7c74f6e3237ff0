"""Small models that denoise images, and parts of U-Nets and priors that are transformers by themselves."""

from typing import Any

import torch

from benchmarks.small_transformers.entry import AXES, WIDE, Small, fraction, grid, image, packed, step
from fp4dit_ao.families.sample_inputs import Random


def _fibo(r: Random) -> dict[str, Any]:
    """One layer of the text encoder for each of the two blocks."""
    return packed(r) | {"text_encoder_layers": [r.normal(2, 8, 32) for _ in range(2)]}


def _sizes(r: Random) -> dict[str, Any]:
    size = torch.full((2, 2), 64.0)
    return image(r, 16) | {"original_size": size, "target_size": size, "crop_coords": torch.zeros(2, 2)}


def _ernie(r: Random) -> dict[str, Any]:
    return {
        "hidden_states": r.normal(2, 16, 4, 4),
        "timestep": fraction(r),
        "text_bth": r.normal(2, 8, 64),
        "text_lens": torch.tensor([8, 5]),
    }


def _flux2(r: Random) -> dict[str, Any]:
    return packed(r, axes=4) | {
        "img_ids": grid(1, 4, 4, 1).expand(2, -1, -1),
        "txt_ids": grid(1, 1, 1, 8).expand(2, -1, -1),
        "guidance": torch.full((2,), 3.5),
    }


def _flux3(r: Random) -> dict[str, Any]:
    reference = {"image_cond_hidden_states": r.normal(2, 16, 32), "image_cond_ids": grid(1, 4, 4, 1) + 1}
    return packed(r, axes=4) | reference


def _glm(r: Random) -> dict[str, Any]:
    return image(r, 16) | {
        "prior_token_id": r.whole(0, 64, 2, 16),
        "prior_token_drop": torch.tensor([[False], [True]]).expand(2, 16),
        "target_size": torch.full((2, 2), 64.0),
        "crop_coords": torch.zeros(2, 2),
    }


def _hidream(r: Random) -> dict[str, Any]:
    return {
        "hidden_states": r.normal(2, 16, 8, 8),
        "encoder_hidden_states_t5": r.normal(2, 8, 64),
        "encoder_hidden_states_llama3": r.normal(2, 2, 8, 64),  # a layer of Llama for each block
        "pooled_embeds": r.normal(2, 64),
        "timesteps": step(r),
    }


def _hunyuan(r: Random) -> dict[str, Any]:
    return image(r, 16) | {
        "hidden_states": r.normal(2, 16, 4, 4),
        "timestep": step(r).float(),
        "encoder_attention_mask": r.mask(2, 8),
        "encoder_hidden_states_2": r.normal(2, 6, 64),
        "encoder_attention_mask_2": r.mask(2, 6),
    }


def _ideogram(r: Random) -> dict[str, Any]:
    """Text first, then the image, in one sequence; 3 marks text and 2 the image."""
    text, patches = torch.arange(8)[:, None].expand(8, 3), 65536 + grid(1, 4, 4).long()
    return {
        "hidden_states": torch.cat([torch.zeros(2, 8, 16), r.normal(2, 16, 16)], 1),
        "encoder_hidden_states": torch.cat([r.normal(2, 8, 64), torch.zeros(2, 16, 64)], 1),
        "timestep": fraction(r),
        "position_ids": torch.cat([text, patches]).expand(2, 24, 3),
        "segment_ids": torch.ones(2, 24, dtype=torch.long),
        "indicator": torch.tensor([3] * 8 + [2] * 16).expand(2, 24),
    }


def _joy(r: Random) -> dict[str, Any]:
    return {
        "hidden_states": r.normal(2, 16, 1, 8, 8),
        "encoder_hidden_states": r.normal(2, 8, 64),
        "timestep": step(r),
    }


def _joy_plus(r: Random) -> dict[str, Any]:
    """Patches of two images a row, which ``shape_list`` tells apart."""
    return _joy(r) | {"hidden_states": r.normal(2, 8, 16, 1, 2, 2), "shape_list": [[(1, 2, 2), (1, 2, 2)]] * 2}


def _krea(r: Random) -> dict[str, Any]:
    return {
        "hidden_states": r.normal(2, 16, 16),
        "encoder_hidden_states": r.normal(2, 8, 2, 64),  # two layers of the text encoder
        "timestep": fraction(r),
        "position_ids": torch.cat([torch.zeros(8, 3), grid(1, 4, 4)]),
        "encoder_attention_mask": r.mask(2, 8).bool(),
    }


def _lumina(r: Random) -> dict[str, Any]:
    angles = torch.rand(8, 8, 16)
    return image(r, 4) | {
        "timestep": fraction(r),
        "encoder_mask": r.mask(2, 8),
        "image_rotary_emb": torch.polar(torch.ones_like(angles), angles),
        "cross_attention_kwargs": {},
    }


def _omnigen(r: Random) -> dict[str, Any]:
    """Text in which one image stands, then a time token and 16 patches of the picture."""
    length = 24 + 1 + 16
    return {
        "hidden_states": r.normal(2, 4, 8, 8),
        "timestep": fraction(r),
        "input_ids": r.whole(0, 64, 2, 24),
        "input_img_latents": [r.normal(1, 4, 8, 8)],
        "input_image_sizes": {0: [[0, 16]]},
        "attention_mask": torch.ones(2, length, length),
        "position_ids": torch.arange(length).expand(2, -1),
    }


def _qwen(r: Random) -> dict[str, Any]:
    return {
        "hidden_states": r.normal(2, 16, 16),
        "encoder_hidden_states": r.normal(2, 8, 64),
        "encoder_hidden_states_mask": r.mask(2, 8),
        "timestep": fraction(r),
        "img_shapes": [(1, 4, 4)] * 2,
    }


def _qwen21(r: Random) -> dict[str, Any]:
    """An image slot stands for four tokens, so that 16 tokens follow a text of 8."""
    return {
        "hidden_states": r.normal(2, 16, 16),
        "encoder_hidden_states": r.normal(2, 8, 64),
        "encoder_hidden_states_mask": torch.ones(2, 8, dtype=torch.bool),
        "timestep": fraction(r),
        "img_shapes": [[(1, 4, 4)]] * 2,
        "img_mask": (torch.arange(12) >= 8).expand(2, 12),
    }


def _z_image(r: Random) -> dict[str, Any]:
    return {
        "x": [r.normal(16, 1, 8, 8) for _ in range(2)],
        "cap_feats": [r.normal(length, 64) for length in (8, 5)],
        "t": fraction(r),
    }


def _u_net(r: Random) -> dict[str, Any]:
    return {"hidden_states": r.normal(2, 32, 8, 8), "encoder_hidden_states": r.normal(2, 8, 64)}


def _prior(r: Random) -> dict[str, Any]:
    return {
        "hidden_states": r.normal(2, 64),
        "timestep": step(r),
        "proj_embedding": r.normal(2, 64),
        "encoder_hidden_states": r.normal(2, 7, 64),
    }


_FLUX = WIDE | {
    "patch_size": 1, "in_channels": 32, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 64,
}  # fmt: skip
_COGVIEW = WIDE | {"num_layers": 1, "text_embed_dim": 64, "time_embed_dim": 64, "condition_dim": 32}
_U_NET = WIDE | {"in_channels": 32, "norm_num_groups": 8, "cross_attention_dim": 64}
_JOY = {"hidden_size": 64, "num_attention_heads": 2, "text_dim": 64, "num_layers": 1, "rope_dim_list": list(AXES)}

IMAGE: dict[str, Small] = {
    "BriaTransformer2DModel": Small(
        _FLUX | {"pooled_projection_dim": None, "axes_dims_rope": [0, 16, 16]}, packed
    ),
    "BriaFiboTransformer2DModel": Small(
        _FLUX | {"pooled_projection_dim": None, "axes_dims_rope": [0, 16, 16], "text_encoder_dim": 32}, _fibo
    ),
    "BriaFibo2Transformer2DModel": Small({
        "in_channels": 16, "dim": 64, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 64,
        "injection_layer_ids": (1,), "perceiver_num_layers": 1, "min_num_gist_tokens": 4, "max_num_gist_tokens": 8,
        "gist_step": 4, "gist_min_text_len": 4, "gist_max_text_len": 16, "axes_dims": AXES, "axes_lens": (64, 32, 32),
    }, lambda r: image(r, 16) | {"timestep": fraction(r), "encoder_hidden_states": r.normal(2, 2, 8, 64)}),
    "ChromaTransformer2DModel": Small(_FLUX | {
        "axes_dims_rope": AXES, "approximator_num_channels": 64, "approximator_hidden_dim": 64, "approximator_layers": 1,
    }, packed),
    "CogView3PlusTransformer2DModel": Small(_COGVIEW | {"sample_size": 16, "pos_embed_max_size": 16}, _sizes),
    "CogView4Transformer2DModel": Small(_COGVIEW, _sizes),
    "DreamLiteTransformer2DModel": Small(_U_NET, _u_net),
    "ErnieImageTransformer2DModel": Small({
        "hidden_size": 64, "num_attention_heads": 2, "num_layers": 1, "ffn_hidden_size": 128, "in_channels": 16,
        "out_channels": 16, "patch_size": 1, "text_in_dim": 64, "rope_axes_dim": AXES,
    }, _ernie),
    "Flux2Transformer2DModel": Small(_FLUX | {"axes_dims_rope": (8,) * 4, "timestep_guidance_channels": 64}, _flux2),
    "Flux3Transformer2DModel": Small(WIDE | {
        "in_channels": 32, "cond_in_channels": 32, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 64,
        "timestep_channels": 64, "axes_dims_rope": (8,) * 4,
    }, _flux3),
    "GlmImageTransformer2DModel": Small(_COGVIEW | {"prior_vq_quantizer_codebook_size": 64}, _glm),
    "HiDreamImageTransformer2DModel": Small(WIDE | {
        "patch_size": 2, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "caption_channels": [64, 64],
        "text_emb_dim": 64, "num_routed_experts": 2, "num_activated_experts": 2, "axes_dims_rope": (16, 8, 8),
        "max_resolution": (32, 32), "llama_layers": (0, 1),
    }, _hidream),
    "HunyuanImageTransformer2DModel": Small(WIDE | {
        "in_channels": 16, "out_channels": 16, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1,
        "mlp_ratio": 2.0, "text_embed_dim": 64, "text_embed_2_dim": 64, "rope_axes_dim": (16, 16),
    }, _hunyuan),
    "Ideogram4Transformer2DModel": Small(WIDE | {
        "in_channels": 16, "num_layers": 1, "intermediate_size": 128, "adaln_dim": 64, "llm_features_dim": 64,
        "mrope_section": (8, 4, 4),
    }, _ideogram),
    "JoyImageEditTransformer3DModel": Small(_JOY, _joy),
    "JoyImageEditPlusTransformer3DModel": Small(_JOY, _joy_plus),
    "Krea2Transformer2DModel": Small(WIDE | {
        "in_channels": 16, "num_layers": 1, "num_key_value_heads": 1, "intermediate_size": 128, "timestep_embed_dim": 64,
        "text_hidden_dim": 64, "num_text_layers": 2, "text_num_attention_heads": 2, "text_num_key_value_heads": 1,
        "text_intermediate_size": 128, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
        "axes_dims_rope": (16, 8, 8),
    }, _krea),
    "LongCatImageTransformer2DModel": Small(_FLUX | {"pooled_projection_dim": 64, "axes_dims_rope": AXES}, packed),
    "LuminaNextDiT2DModel": Small({
        "sample_size": 16, "hidden_size": 64, "num_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 64,
        "cross_attention_dim": 64, "learn_sigma": False,
    }, _lumina),
    "NucleusMoEImageTransformer2DModel": Small(WIDE | {
        "in_channels": 16, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 64, "axes_dims_rope": AXES,
        "dense_moe_strategy": "leave_first_block_dense", "num_experts": 4, "moe_intermediate_dim": 64,
        "capacity_factors": 2.0,
    }, _qwen),
    "OmniGenTransformer2DModel": Small({
        "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 128, "num_layers": 1,
        "pad_token_id": 0, "vocab_size": 64, "time_step_dim": 64,
        "rope_scaling": {"long_factor": [1.0] * 16, "short_factor": [1.0] * 16},
    }, _omnigen),
    "OvisImageTransformer2DModel": Small(_FLUX | {"out_channels": 32, "axes_dims_rope": AXES}, packed),
    "PriorTransformer": Small(WIDE | {
        "num_layers": 1, "embedding_dim": 64, "num_embeddings": 7, "additional_embeddings": 4,
    }, _prior),
    "PRXTransformer2DModel": Small({
        "context_in_dim": 64, "hidden_size": 64, "mlp_ratio": 2.0, "num_heads": 2, "depth": 1, "axes_dim": [16, 16],
    }, lambda r: image(r, 16) | {"timestep": fraction(r)}),
    "QwenImageTransformer2DModel": Small(WIDE | {
        "in_channels": 16, "out_channels": 4, "num_layers": 1, "joint_attention_dim": 64, "axes_dims_rope": AXES,
    }, _qwen),
    "QwenImage21Transformer2DModel": Small(WIDE | {
        "in_channels": 16, "out_channels": 16, "num_layers": 1, "context_in_dim": 64, "mlp_ratio": 2, "axes_dims_rope": AXES,
    }, _qwen21),
    "Transformer2DModel": Small(_U_NET, _u_net),
    "TransformerTemporalModel": Small(
        WIDE | {"in_channels": 32, "norm_num_groups": 8, "num_layers": 1},
        lambda r: {"hidden_states": r.normal(4, 32, 8, 8), "num_frames": 2},
    ),
    "ZImageTransformer2DModel": Small({
        "dim": 96, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 3, "n_kv_heads": 3, "cap_feat_dim": 64,
        "axes_dims": list(AXES), "axes_lens": [256, 32, 32],
    }, _z_image),
}  # fmt: skip
"""Small models by the name of their class; those of the table of families stand in ``known.py``."""
