"""Table of model families: modules kept in high precision, differing recipes, example inputs.

Models of other families are quantized with safe defaults; see :func:`fp4dit_ao.families.family_of`.
"""

from fp4dit_ao.families import sample_inputs
from fp4dit_ao.families.family import EIGHT_BIT_MODULATION, Family

E2M1_THROUGHOUT = {"pre_gelu_weight": None}
"""Recipe of families that the paper does not cover: its E3M0 before GELU lost accuracy in every family measured."""


FAMILIES: tuple[Family, ...] = (
    Family(
        "PixArt-Σ",
        "PixArtTransformer2DModel",
        paper={"weight": "e1m2"},
        # Σ's configs, converted from the original code, set both fields; α's set neither
        when=lambda config: config.use_additional_conditions is False and config.interpolation_scale is not None,
        sample=sample_inputs.pixart,
    ),
    Family(
        "PixArt-α",
        "PixArtTransformer2DModel",
        sample=sample_inputs.pixart,
    ),
    Family(
        "Hunyuan-DiT",
        "HunyuanDiT2DModel",
        layers={"*.skip_linear": {"split_inputs": True}},
        sample=sample_inputs.hunyuan,
        shared=("image_rotary_emb",),
    ),
    Family(
        "DiT",
        "DiTTransformer2DModel",
        paper=E2M1_THROUGHOUT,
        sample=sample_inputs.dit,
    ),
    Family(
        "SD3",
        "SD3Transformer2DModel",
        paper=E2M1_THROUGHOUT,
        sample=sample_inputs.sd3,
    ),
    Family(
        "FLUX.1",
        "FluxTransformer2DModel",
        paper=E2M1_THROUGHOUT,
        layers=EIGHT_BIT_MODULATION | {"single_transformer_blocks.*.proj_out": {"split_inputs": True}},
        sample=sample_inputs.flux,
        shared=("img_ids", "txt_ids"),
    ),
    Family(
        "Sana",
        "SanaTransformer2DModel",
        paper=E2M1_THROUGHOUT,
        sample=sample_inputs.sana,
    ),
    Family(
        "Lumina 2",
        "Lumina2Transformer2DModel",
        paper=E2M1_THROUGHOUT,
        sample=sample_inputs.lumina2,
    ),
    Family(
        "AuraFlow",
        "AuraFlowTransformer2DModel",
        paper=E2M1_THROUGHOUT,
        sample=sample_inputs.auraflow,
    ),
    Family(
        "CogVideoX",
        "CogVideoXTransformer3DModel",
        paper=E2M1_THROUGHOUT,
        sample=sample_inputs.cogvideox,
        shared=("image_rotary_emb", "ofs"),
    ),
    Family(
        "Wan",
        "WanTransformer3DModel",
        paper=E2M1_THROUGHOUT,
        sample=sample_inputs.wan,
    ),
    Family(
        "LTX-Video",
        "LTXVideoTransformer3DModel",
        paper=E2M1_THROUGHOUT,
        sample=sample_inputs.ltx,
    ),
)  # fmt: skip
"""All families; a model belongs to the first that fits."""
