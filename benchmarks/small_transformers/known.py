"""Small models of the families of the table, and of variants with other inputs."""

from typing import Any

_HEADS = {"num_attention_heads": 2, "attention_head_dim": 64}

KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "PixArt-α": ("PixArtTransformer2DModel", {
        "num_attention_heads": 6, "attention_head_dim": 64, "cross_attention_dim": 384, "num_layers": 1, "sample_size": 16,
        "caption_channels": 96, "use_additional_conditions": True,
    }),
    "PixArt-Σ": ("PixArtTransformer2DModel", _HEADS | {
        "cross_attention_dim": 128, "num_layers": 2, "sample_size": 16, "caption_channels": 96, "interpolation_scale": 2,
        "use_additional_conditions": False,
    }),
    "Hunyuan-DiT": ("HunyuanDiT2DModel", _HEADS | {
        "in_channels": 4, "patch_size": 2, "sample_size": 16, "hidden_size": 128, "num_layers": 4, "cross_attention_dim": 64,
        "cross_attention_dim_t5": 96, "pooled_projection_dim": 64, "text_len": 7, "text_len_t5": 9,
    }),
    "DiT": ("DiTTransformer2DModel", _HEADS | {"out_channels": 8, "num_layers": 1, "sample_size": 16}),
    "SD3": ("SD3Transformer2DModel", _HEADS | {
        "sample_size": 16, "num_layers": 2, "joint_attention_dim": 96, "caption_projection_dim": 128,
        "pooled_projection_dim": 64, "pos_embed_max_size": 24, "dual_attention_layers": (0,), "qk_norm": "rms_norm",
    }),
    "FLUX.1": ("FluxTransformer2DModel", {
        "num_attention_heads": 1, "attention_head_dim": 128, "num_layers": 1, "num_single_layers": 1,
        "joint_attention_dim": 96, "pooled_projection_dim": 64, "guidance_embeds": True,
    }),
    "Sana": ("SanaTransformer2DModel", {
        "num_attention_heads": 7, "attention_head_dim": 32, "num_cross_attention_heads": 2, "cross_attention_head_dim": 112,
        "cross_attention_dim": 224, "num_layers": 1, "caption_channels": 96, "sample_size": 16,
    }),
    "Lumina 2": ("Lumina2Transformer2DModel", {
        "hidden_size": 192, "num_layers": 1, "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1,
        "multiple_of": 128, "cap_feat_dim": 96,
    }),
    "AuraFlow": ("AuraFlowTransformer2DModel", _HEADS | {
        "sample_size": 16, "num_mmdit_layers": 1, "num_single_dit_layers": 1, "joint_attention_dim": 96,
        "caption_projection_dim": 128, "pos_embed_max_size": 256,
    }),
    "CogVideoX": ("CogVideoXTransformer3DModel", _HEADS | {
        "time_embed_dim": 64, "text_embed_dim": 96, "num_layers": 1, "sample_width": 16, "sample_height": 16,
        "sample_frames": 9, "max_text_seq_length": 10,
    }),
    "CogVideoX, rotary": ("CogVideoXTransformer3DModel", _HEADS | {
        "time_embed_dim": 64, "text_embed_dim": 96, "num_layers": 1, "sample_width": 16, "sample_height": 16,
        "sample_frames": 9, "max_text_seq_length": 10, "use_rotary_positional_embeddings": True, "patch_size_t": 2,
        "ofs_embed_dim": 64,
    }),
    "Wan": ("WanTransformer3DModel", {
        "num_attention_heads": 1, "attention_head_dim": 128, "text_dim": 96, "freq_dim": 64, "ffn_dim": 256, "num_layers": 1,
    }),
    "Wan, image to video": ("WanTransformer3DModel", {
        "num_attention_heads": 1, "attention_head_dim": 128, "text_dim": 96, "freq_dim": 64, "ffn_dim": 256, "num_layers": 1,
        "in_channels": 36, "image_dim": 80, "added_kv_proj_dim": 128,
    }),
    "LTX-Video": ("LTXVideoTransformer3DModel", _HEADS | {
        "cross_attention_dim": 128, "num_layers": 1, "caption_channels": 96,
    }),
}  # fmt: skip
"""Class and config of a narrow, shallow model of each family, and of variants with other inputs."""
