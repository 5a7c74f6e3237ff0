"""The one table that knows model families by name: what stays in high precision, whose recipe differs, how a sample looks.

A model that is not in it is quantized with safe defaults; see :func:`fp4dit_ao.families.family_of`.
"""

from fp4dit_ao.families import forward_rewrites, sample_inputs
from fp4dit_ao.families.family import Family

E2M1_THROUGHOUT = {"pre_gelu_weight": None}
"""Where the paper says nothing: its E3M0 before GELU cost more than it gained wherever it was measured."""

_MODULATION = {"activation": "int8"}
"""Of one vector an image: 8 bits cost little there, and an error would reach every token."""

_POSITIONS = {"PatchEmbed.forward": forward_rewrites.patch_embed}

_ADALN_EMBEDDERS = ("time_text_embed*", "context_embedder", "norm_out*", "proj_out*")

FAMILIES: tuple[Family, ...] = (
    Family(
        "PixArt-Σ",
        "PixArtTransformer2DModel",
        skip=("pos_embed*", "adaln_single*", "caption_projection*", "proj_out*"),
        paper={"weight": "e1m2"},
        # as converted from the original: α's configs name neither
        when=lambda config: config.use_additional_conditions is False and config.interpolation_scale is not None,
        sample=sample_inputs.pixart,
        rewrites=_POSITIONS,
    ),
    Family(
        "PixArt-α",
        "PixArtTransformer2DModel",
        skip=("pos_embed*", "adaln_single*", "caption_projection*", "proj_out*"),
        sample=sample_inputs.pixart,
        rewrites=_POSITIONS,
    ),
    Family(
        "Hunyuan-DiT",
        "HunyuanDiT2DModel",
        skip=("pos_embed*", "time_extra_emb*", "text_embedder*", "norm_out*", "proj_out*"),
        layers={"*.skip_linear": {"split_inputs": True}},
        sample=sample_inputs.hunyuan,
        shared=("image_rotary_emb",),
    ),
    Family(
        "DiT",
        "DiTTransformer2DModel",
        skip=("pos_embed*", "*.norm1.emb.*", "proj_out*"),
        paper=E2M1_THROUGHOUT,
        layers={"*.norm1.linear": _MODULATION},
        sample=sample_inputs.dit,
        rewrites={"DiTTransformer2DModel.forward": forward_rewrites.dit, **_POSITIONS},
    ),
    Family(
        "SD3",
        "SD3Transformer2DModel",
        skip=("pos_embed*", *_ADALN_EMBEDDERS),
        paper=E2M1_THROUGHOUT,
        layers={"*.norm1*.linear": _MODULATION},
        sample=sample_inputs.sd3,
    ),
    Family(
        "FLUX.1",
        "FluxTransformer2DModel",
        skip=("x_embedder", *_ADALN_EMBEDDERS),
        paper=E2M1_THROUGHOUT,
        layers={"*.norm*.linear": _MODULATION, "single_transformer_blocks.*.proj_out": {"split_inputs": True}},
        sample=sample_inputs.flux,
        shared=("img_ids", "txt_ids"),
    ),
    Family(
        "Sana",
        "SanaTransformer2DModel",
        skip=("patch_embed*", "time_embed*", "caption_projection*", "proj_out*"),
        paper=E2M1_THROUGHOUT,
        sample=sample_inputs.sana,
    ),
    Family(
        "Lumina 2",
        "Lumina2Transformer2DModel",
        skip=("x_embedder", "time_caption_embed*", "norm_out*"),
        paper=E2M1_THROUGHOUT,
        layers={"*.norm1.linear": _MODULATION},
        sample=sample_inputs.lumina2,
        rewrites={"Lumina2Transformer2DModel.forward": forward_rewrites.lumina2},
    ),
    Family(
        "AuraFlow",
        "AuraFlowTransformer2DModel",
        skip=("pos_embed*", "time_step_*", "context_embedder", "norm_out*", "proj_out*"),
        paper=E2M1_THROUGHOUT,
        layers={"*.norm1*.linear": _MODULATION},
        sample=sample_inputs.auraflow,
    ),
    Family(
        "CogVideoX",
        "CogVideoXTransformer3DModel",
        skip=("patch_embed*", "time_embedding*", "ofs_embedding*", "norm_out*", "proj_out*"),
        paper=E2M1_THROUGHOUT,
        layers={"*.norm?.linear": _MODULATION},
        sample=sample_inputs.cogvideox,
        shared=("image_rotary_emb", "ofs"),
        rewrites={"CogVideoXPatchEmbed._get_positional_embeddings": forward_rewrites.cogvideox_positions},
    ),
    Family(
        "Wan",
        "WanTransformer3DModel",
        skip=("patch_embedding", "condition_embedder*", "proj_out*"),
        paper=E2M1_THROUGHOUT,
        sample=sample_inputs.wan,
    ),
    Family(
        "LTX-Video",
        "LTXVideoTransformer3DModel",
        skip=("proj_in", "time_embed*", "caption_projection*", "proj_out*"),
        paper=E2M1_THROUGHOUT,
        sample=sample_inputs.ltx,
    ),
)  # fmt: skip
"""The first that fits a model is its family."""
