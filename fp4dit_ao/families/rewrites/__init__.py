"""Rewrites: functions that run in the place of diffusers' methods and functions while a model is captured, and compute the
same.

They stand where the own code cannot be recorded for every size: Python lists as long as the batch, numbers read from
tensors, tensors cut by what masks say.
"""

from fp4dit_ao.families.rewrites import (
    bria_fibo2,
    conditions,
    experts,
    hunyuan,
    lumina2,
    mochi,
    patches,
    positions,
    qwen_image,
    sana_wm,
    z_image,
)
from fp4dit_ao.families.rewrites.replacing import Method, methods_replaced

__all__ = ["REWRITES", "Method", "methods_replaced"]

REWRITES: dict[str, Method] = {
    "BriaFibo2Transformer2DModel.forward": bria_fibo2.bria_fibo2,
    "ChromaCombinedTimestepTextProjEmbeddings.forward": conditions.chroma_times,
    "CogVideoXPatchEmbed._get_positional_embeddings": positions.cogvideox_positions,
    "CosmosLearnablePositionalEmbed.forward": positions.cosmos_positions,
    "DiTTransformer2DModel.forward": patches.dit,
    "GLUMBConvTemp.forward": sana_wm.gated_convolutions,
    "GlmImageTransformer2DModel.forward": conditions.glm_image,
    "HiDreamImageTransformer2DModel.patchify": patches.hidream_patches,
    "HiDreamImageTransformer2DModel.unpatchify": patches.hidream_unpatched,
    "HunyuanImageTransformer2DModel.forward": hunyuan.hunyuan_image,
    "HunyuanVideo15Transformer3DModel.forward": hunyuan.hunyuan_video15,
    "HunyuanVideoFramepackTransformer3DModel.forward": hunyuan.framepack,
    "Lumina2Transformer2DModel.forward": lumina2.lumina2,
    "LuminaPatchEmbed.forward": patches.lumina_patches,
    "MOEFeedForwardSwiGLU.moe_infer": experts.hidream_experts,
    "MochiAttention.forward": mochi.mochi_attention,
    "MochiRoPE._get_positions": mochi.mochi_positions,
    "MoEGate.forward": experts.hidream_router,
    "OmniGenSuScaledRotaryEmbedding.forward": positions.omnigen_rotation,
    "PatchEmbed.forward": patches.patch_embed,
    "QwenImageTransformer2DModel.forward": qwen_image.qwen_image,
    "QwenImage21Transformer2DModel.forward": qwen_image.qwen_image21,
    "SwiGLUExperts.forward": experts.nucleus_experts,
    "WanAnimateTransformer3DModel.forward": conditions.wan_animate,
    "ZImageTransformer2DModel._build_unified_sequence": z_image.z_image_joined,
    "ZImageTransformer2DModel._pad_with_ids": z_image.z_image_padded,
    "ZImageTransformer2DModel._prepare_sequence": z_image.z_image_sequence,
    "transformer_sana_wm.create_grid": sana_wm.pixels,
    "transformer_sana_wm.torch_chunk_cam_single_path_delta_rule": sana_wm.camera_delta_rule,
    "transformer_sana_wm.torch_chunk_sana_gdn": sana_wm.delta_rule,
}
"""All of them, by ``"Class.method"`` of diffusers, or ``"module.function"`` where a function does what cannot be recorded: a
model has them wherever it has a module of such a class."""
