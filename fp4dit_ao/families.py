"""The one table that knows model families by name: what stays in high precision, whose recipe differs, how a sample looks.

A model that is not in it is quantized with safe defaults; see :func:`family_of`.
"""

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from fp4dit_ao import exportable, inputs
from fp4dit_ao.config import HIGH_PRECISION, QuantConfig
from fp4dit_ao.quantizer import FP4DiTQuantizer

_PAPER = ("w4a6", "w4a8", "w4a6_static", "w4a6_mse")
"""Recipes that are the paper's, and so may mean other formats for another family; all others say their formats themselves."""


@dataclass(frozen=True)
class Family:
    """What the package knows of one family of models."""

    name: str
    transformer: str
    """Name of the diffusers class."""
    skip: tuple[str, ...] = HIGH_PRECISION
    """Globs over module names that stay in high precision."""
    paper: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ``QuantConfig`` that the paper's recipes have here."""
    layers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By glob over module names: fields that every recipe has there."""
    when: Callable[[Any], bool] = lambda config: True
    """Tells families of one class apart, by the model's config."""
    sample: inputs.Inputs | None = None
    """Random keyword arguments of ``forward``."""
    shared: tuple[str, ...] = ()
    """Arguments of ``forward`` that all rows of a batch share, so that their first dimension is not the batch."""
    rewrites: Mapping[str, exportable.Method] = field(default_factory=dict)
    """By ``"Class.method"``: code that runs in the method's place while the model is captured."""


_E2M1_THROUGHOUT = {"pre_gelu_weight": None}
"""Where the paper says nothing: its E3M0 before GELU cost more than it gained wherever it was measured."""
_MODULATION = {"activation": "int8"}
"""Of one vector an image: 8 bits cost little there, and an error would reach every token."""
_POSITIONS = {"PatchEmbed.forward": exportable.patch_embed}
_ADALN_EMBEDDERS = ("time_text_embed*", "context_embedder", "norm_out*", "proj_out*")

FAMILIES: tuple[Family, ...] = (
    Family(
        "PixArt-Σ",
        "PixArtTransformer2DModel",
        skip=("pos_embed*", "adaln_single*", "caption_projection*", "proj_out*"),
        paper={"weight": "e1m2"},
        # as converted from the original: α's configs name neither
        when=lambda config: config.use_additional_conditions is False and config.interpolation_scale is not None,
        sample=inputs.pixart,
        rewrites=_POSITIONS,
    ),
    Family(
        "PixArt-α",
        "PixArtTransformer2DModel",
        skip=("pos_embed*", "adaln_single*", "caption_projection*", "proj_out*"),
        sample=inputs.pixart,
        rewrites=_POSITIONS,
    ),
    Family(
        "Hunyuan-DiT",
        "HunyuanDiT2DModel",
        skip=("pos_embed*", "time_extra_emb*", "text_embedder*", "norm_out*", "proj_out*"),
        layers={"*.skip_linear": {"split_inputs": True}},
        sample=inputs.hunyuan,
        shared=("image_rotary_emb",),
    ),
    Family(
        "DiT",
        "DiTTransformer2DModel",
        skip=("pos_embed*", "*.norm1.emb.*", "proj_out*"),
        paper=_E2M1_THROUGHOUT,
        layers={"*.norm1.linear": _MODULATION},
        sample=inputs.dit,
        rewrites={"DiTTransformer2DModel.forward": exportable.dit, **_POSITIONS},
    ),
    Family(
        "SD3",
        "SD3Transformer2DModel",
        skip=("pos_embed*", *_ADALN_EMBEDDERS),
        paper=_E2M1_THROUGHOUT,
        layers={"*.norm1*.linear": _MODULATION},
        sample=inputs.sd3,
    ),
    Family(
        "FLUX.1",
        "FluxTransformer2DModel",
        skip=("x_embedder", *_ADALN_EMBEDDERS),
        paper=_E2M1_THROUGHOUT,
        layers={"*.norm*.linear": _MODULATION, "single_transformer_blocks.*.proj_out": {"split_inputs": True}},
        sample=inputs.flux,
        shared=("img_ids", "txt_ids"),
    ),
    Family(
        "Sana",
        "SanaTransformer2DModel",
        skip=("patch_embed*", "time_embed*", "caption_projection*", "proj_out*"),
        paper=_E2M1_THROUGHOUT,
        sample=inputs.sana,
    ),
    Family(
        "Lumina 2",
        "Lumina2Transformer2DModel",
        skip=("x_embedder", "time_caption_embed*", "norm_out*"),
        paper=_E2M1_THROUGHOUT,
        layers={"*.norm1.linear": _MODULATION},
        sample=inputs.lumina2,
        rewrites={"Lumina2Transformer2DModel.forward": exportable.lumina2},
    ),
    Family(
        "AuraFlow",
        "AuraFlowTransformer2DModel",
        skip=("pos_embed*", "time_step_*", "context_embedder", "norm_out*", "proj_out*"),
        paper=_E2M1_THROUGHOUT,
        layers={"*.norm1*.linear": _MODULATION},
        sample=inputs.auraflow,
    ),
    Family(
        "CogVideoX",
        "CogVideoXTransformer3DModel",
        skip=("patch_embed*", "time_embedding*", "ofs_embedding*", "norm_out*", "proj_out*"),
        paper=_E2M1_THROUGHOUT,
        layers={"*.norm?.linear": _MODULATION},
        sample=inputs.cogvideox,
        shared=("image_rotary_emb", "ofs"),
        rewrites={"CogVideoXPatchEmbed._get_positional_embeddings": exportable.cogvideox_positions},
    ),
    Family(
        "Wan",
        "WanTransformer3DModel",
        skip=("patch_embedding", "condition_embedder*", "proj_out*"),
        paper=_E2M1_THROUGHOUT,
        sample=inputs.wan,
    ),
    Family(
        "LTX-Video",
        "LTXVideoTransformer3DModel",
        skip=("proj_in", "time_embed*", "caption_projection*", "proj_out*"),
        paper=_E2M1_THROUGHOUT,
        sample=inputs.ltx,
    ),
)  # fmt: skip
"""The first that fits a model is its family."""


def family_of(model: nn.Module) -> Family:
    """The family of ``model``; one of safe defaults, named after its class, if the table has none.

    Those defaults leave every linear outside of the numbered blocks in high precision, and what :data:`HIGH_PRECISION` names.
    """
    config = getattr(model, "config", None)
    kind = type(model).__name__
    for family in FAMILIES:
        if family.transformer == kind and family.when(config):
            return family
    outside = tuple(name for name, x in model.named_modules() if isinstance(x, nn.Linear) and not _in_block(name))
    return Family(kind, kind, skip=HIGH_PRECISION + outside, paper=_E2M1_THROUGHOUT)


def _in_block(name: str) -> bool:
    return re.search(r"(^|\.)\d+\.", name) is not None


def recipe_for(model: nn.Module, recipe: str | QuantConfig = "w4a6") -> QuantConfig:
    """A recipe as it is for ``model``'s family. A config that is given rather than named stays as it is.

    Raises:
        ValueError: no such recipe.
    """
    if isinstance(recipe, QuantConfig):
        return recipe
    family = family_of(model)
    config = QuantConfig.from_name(recipe)
    fields: dict[str, Any] = {"skip": family.skip, "indivisible": "divisor"}
    if recipe in _PAPER:
        fields |= family.paper
    return dataclasses.replace(config, **fields)


def quantizer_for(model: nn.Module, recipe: str | QuantConfig = "w4a6") -> FP4DiTQuantizer:
    """A quantizer for ``model``, set up with a recipe as it is for its family; further rules may be added.

    A model of no known family is quantized with safe defaults, and a warning says which.

    Args:
        model: the float model.
        recipe: a name in ``config.RECIPES``; or a config, which is used as it is.

    Raises:
        ValueError: no such recipe.
    """
    config = recipe_for(model, recipe)
    quantizer = FP4DiTQuantizer().set_global(config)
    if isinstance(recipe, QuantConfig):
        return quantizer
    family = family_of(model)
    names = [name for name, _ in model.named_modules()]
    for glob, fields in family.layers.items():
        if "activation" in fields and (config.activation is None or config.activation_granularity == "block"):
            continue  # a recipe for weights alone, or of a block format, which is one for all layers
        if any(fnmatchcase(name, glob) for name in names):
            quantizer.set_module_name(glob, dataclasses.replace(config, **fields))
    if family not in FAMILIES:
        outside = family.skip[len(HIGH_PRECISION) :]
        warnings.warn(
            f"{family.name} is no family that fp4dit_ao knows; quantizing the linears of its numbered blocks, weights "
            f"{config.weight} in groups of {config.group_size} or the largest divisor, and leaving {len(outside)} linears "
            f"outside of them as they are ({', '.join(outside[:4]) or 'none'}{', …' if len(outside) > 4 else ''})",
            stacklevel=2,
        )
    return quantizer


def example_inputs(
    model: nn.Module, size: inputs.Size | None = None, *, seed: int = 0, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Random keyword arguments of ``model.forward``, as its pipeline would pass them: enough to capture it.

    Args:
        model: a float model of a known family.
        size: how large; small if None.
        seed: of the numbers.
        dtype: of floating-point tensors; the model's if None.

    Raises:
        ValueError: the table does not know the model's family.
    """
    family = family_of(model)
    if family.sample is None:
        raise ValueError(
            f"{family.name} is no family that fp4dit_ao knows, so it cannot make up a sample; "
            "take one from a pipeline: collect_samples(pipe, prompts)"
        )
    dtype = dtype or next(p.dtype for p in model.parameters() if p.is_floating_point())
    return family.sample(model.config, size or inputs.Size(), inputs.Random(seed, dtype))
