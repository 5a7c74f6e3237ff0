"""Looks up a model's family, and the recipe, quantizer and example inputs that follow from it."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from fp4dit_ao import _compat
from fp4dit_ao.config import DEFAULT_RECIPE, Fields, QuantConfig
from fp4dit_ao.families import sample_inputs
from fp4dit_ao.families.dtypes import main_dtype
from fp4dit_ao.families.family import Family
from fp4dit_ao.families.patterns import outside_blocks
from fp4dit_ao.families.table import E2M1_THROUGHOUT, FAMILIES
from fp4dit_ao.quantizer import FP4DiTQuantizer
from fp4dit_ao.schemes import scheme_of

_PAPER = ("w4a6", "w4a8", "w4a6_static", "w4a6_mse")
"""Recipes of the paper, whose formats depend on the family; all other recipes name their formats outright."""


def check_not_compiled(model: nn.Module) -> None:
    """Raises ``ValueError`` if ``model`` is what ``torch.compile(module)`` returned: its modules have other names."""
    if _compat.is_compiled_copy(model):
        kind = type(model).__name__
        raise ValueError(f"this {kind} is a compiled model: quantize the model that it was made from, then compile")


def family_of(model: nn.Module) -> Family:
    """Family of ``model``; if the table has none, one with safe defaults, named after the model's class.

    In every family, linears outside of numbered blocks stay in high precision.

    Raises:
        ValueError: ``model`` is the result of ``torch.compile``.
    """
    check_not_compiled(model)
    kind = type(model).__name__
    family = _row_of(model) or Family(kind, kind, paper=E2M1_THROUGHOUT)
    outside = outside_blocks(model)
    return dataclasses.replace(family, skip=family.skip + outside) if outside else family


def _row_of(model: nn.Module) -> Family | None:
    """Row of the table that fits ``model``."""
    kind, config = type(model).__name__, getattr(model, "config", None)
    return next((family for family in FAMILIES if family.transformer == kind and family.when(config)), None)


def recipe_for(
    model: nn.Module, recipe: str | QuantConfig = DEFAULT_RECIPE, fields: Fields | None = None
) -> QuantConfig:
    """Config of a named recipe, adapted to ``model``'s family; a config is not adapted.

    Args:
        model: the float model.
        recipe: a name in ``config.RECIPES``, or a config.
        fields: fields of the config that take other values, by name.

    Raises:
        ValueError: no such recipe or field, or a value that the field cannot have.
    """
    config = recipe if isinstance(recipe, QuantConfig) else _adapted(model, recipe)
    return config.with_fields(fields) if fields else config


def _adapted(model: nn.Module, recipe: str) -> QuantConfig:
    family = family_of(model)
    config = QuantConfig.from_name(recipe)
    fields: Fields = {"skip": family.skip, "indivisible": "divisor"}
    if recipe in _PAPER:
        fields = {**fields, **family.paper}
    return dataclasses.replace(config, **fields)


def quantizer_for(
    model: nn.Module,
    recipe: str | QuantConfig = DEFAULT_RECIPE,
    skip: Sequence[str] = (),
    fields: Fields | None = None,
    layers: Mapping[str, str | QuantConfig | None] | None = None,
) -> FP4DiTQuantizer:
    """Quantizer for ``model``, set up with a recipe adapted to its family; callers may add rules.

    A model of an unknown family is quantized with safe defaults, and a warning says which.

    Args:
        model: the float model.
        recipe: a name in ``config.RECIPES``; or a config, which is used unchanged.
        skip: globs over module names that stay in high precision, besides the recipe's own.
        fields: fields of the recipe's config that take other values, by name.
        layers: recipes or configs of some modules, by globs over their names; None leaves them in high precision. Of several
            that match, the last one holds.

    Raises:
        ValueError: no such recipe or field, or ``model`` is the result of ``torch.compile``.
    """
    check_not_compiled(model)
    config = recipe_for(model, recipe, fields)
    quantizer = FP4DiTQuantizer().set_global(config)
    if not isinstance(recipe, QuantConfig):
        _set_family_rules(quantizer, model, config)
    for glob in skip:
        quantizer.set_module_name(glob, None)
    for glob, rule in (layers or {}).items():
        quantizer.set_module_name(glob, None if rule is None else recipe_for(model, rule, fields))
    return quantizer


def _set_family_rules(quantizer: FP4DiTQuantizer, model: nn.Module, config: QuantConfig) -> None:
    """Adds the rules that every recipe has for some layers of ``model``'s family; warns if the family is unknown."""
    family = family_of(model)
    for glob, fields in family.layers.items():
        if "activation" in fields and (config.activation is None or scheme_of(config).one_format):
            continue  # a recipe for weights alone, or of a block format, which is one for all layers
        quantizer.set_module_pattern(glob, dataclasses.replace(config, **fields))
    if _row_of(model) is None:
        outside = _kept_linears(model, family)
        warnings.warn(
            f"{family.name} is no family that fp4dit_ao knows; quantizing the linears of its numbered blocks, weights "
            f"{config.weight} in groups of {config.group_size} or the largest divisor, and leaving {len(outside)} linears "
            f"as they are ({', '.join(outside[:4]) or 'none'}{', …' if len(outside) > 4 else ''})",
            stacklevel=3,
        )


def _kept_linears(model: nn.Module, family: Family) -> list[str]:
    """Names of ``model``'s linears that its family keeps in high precision."""
    linears = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return [name for name in linears if any(fnmatchcase(name, glob) for glob in family.skip)]


def example_inputs(
    model: nn.Module, size: sample_inputs.Size | None = None, *, seed: int = 0, dtype: torch.dtype | None = None
) -> dict[str, object]:
    """Random keyword arguments of ``model.forward`` with the shapes that its pipeline passes, for capturing the model.

    Args:
        model: a float model of a known family.
        size: sizes of the tensors; small ones if None.
        seed: seed of the random numbers.
        dtype: type of floating-point tensors; the model's if None.

    Raises:
        ValueError: the model's family is not in the table, or it is the result of ``torch.compile``.
    """
    family = family_of(model)
    if family.sample is None:
        raise ValueError(
            f"{family.name} is no family that fp4dit_ao knows, so it cannot make up a sample; "
            "take one from a pipeline: collect_samples(pipe, prompts)"
        )
    dtype = dtype or main_dtype(model.named_parameters(), _compat.kept_in_float32(model))
    return family.sample(model.config, size or sample_inputs.Size(), sample_inputs.Random(seed, dtype))
