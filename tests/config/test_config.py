"""Recipes, and what a QuantConfig refuses."""

import json
from dataclasses import asdict, replace

import pytest

from fp4dit_ao import QuantConfig, w4a6, w4a6_auto, w4a8
from fp4dit_ao.config import RECIPES
from fp4dit_ao.formats import CODEBOOK_SETS, parse


def test_the_papers_recipes() -> None:
    recipe = w4a6()
    assert (recipe.weight, recipe.pre_gelu_weight, recipe.activation, recipe.attention) == (
        "e2m1",
        "e3m0",
        "e2m3",
        "e2m3",
    )
    assert (recipe.group_size, recipe.weight_granularity, recipe.weight_search) == (128, "group", "absmax")
    assert recipe.activation_granularity == "token"
    assert w4a8() == replace(recipe, activation="e3m4", attention="e3m4")
    assert w4a6_auto() == replace(
        recipe, weight_candidates=("e1m2", "e2m1", "e3m0", "nf4"), pre_gelu_weight=None, weight_search="mse"
    )


def test_every_recipe_by_name_and_what_its_name_promises() -> None:
    for name in RECIPES:
        recipe = QuantConfig.from_name(name)
        if recipe.activation_granularity == "block":
            continue
        weight_bits, activation_bits = (int(digit) for digit in name.removeprefix("int_")[1:4].split("a"))
        weights = [recipe.weight, recipe.pre_gelu_weight, *recipe.weight_candidates]
        assert {(CODEBOOK_SETS.get(fmt) or parse(fmt)).bits for fmt in weights if fmt} == {weight_bits}
        assert {parse(fmt).bits for fmt in (recipe.activation, recipe.attention) if fmt} == {activation_bits}
        if name.startswith("int_"):
            assert all(str(parse(fmt)).startswith("e0") for fmt in weights if fmt)
    assert QuantConfig.from_name("w4a6") == QuantConfig() == w4a6()


@pytest.mark.parametrize(
    ("name", "fmt", "block", "scale"),
    [("nvfp4", "e2m1", 16, "e4m3"), ("mxfp4", "e2m1", 32, "e8m0"), ("mxfp6_e2m3", "e2m3", 32, "e8m0"),
     ("mxfp6_e3m2", "e3m2", 32, "e8m0")],
)  # fmt: skip
def test_block_formats_are_what_their_standard_says(name, fmt, block, scale) -> None:
    recipe = QuantConfig.from_name(name)
    assert (recipe.weight, recipe.activation, recipe.group_size, recipe.scale_dtype) == (fmt, fmt, block, scale)
    assert (recipe.attention, recipe.pre_gelu_weight) == (None, None)


def test_an_unknown_recipe_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown recipe 'w3a3'; choose one of .*w4a6, .*w4a8"):
        QuantConfig.from_name("w3a3")


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_json_round_trip(name: str) -> None:
    recipe = QuantConfig.from_name(name)
    assert QuantConfig.from_dict(json.loads(json.dumps(asdict(recipe)))) == recipe
    assert hash(QuantConfig.from_dict(asdict(recipe))) == hash(recipe)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": "fp4"}, r"QuantConfig: weight: unknown number format 'fp4'; write 'e2m1'"),
        ({"activation": "e9m9"}, r"QuantConfig: activation: format e9m9 has 19 bits; a format has 2 to 8"),
        ({"pre_gelu_weight": "int1"}, r"QuantConfig: pre_gelu_weight: format e0m0 has 1 bits"),
        ({"attention": 6}, r"QuantConfig: attention: unknown number format 6"),
        ({"weight": ["e2m1"]}, r"QuantConfig: weight: unknown number format \['e2m1'\]"),
        ({"weight_candidates": ("e2m1", "e3m9")}, r"QuantConfig: weight_candidates: format e3m9 has 13 bits"),
        ({"weight_candidates": "e2m1"}, r"weight_candidates='e2m1'; it must be a tuple of names"),
        ({"weight_candidates": (None,)}, r"weight_candidates=\(None,\); it must be a tuple of names"),
        ({"skip": "proj_out*"}, r"skip='proj_out\*'; it must be a tuple of names, such as \('proj_out\*',\)"),
        ({"skip": None}, r"skip=None; it must be a tuple of names"),
        ({"skip": (1,)}, r"skip=\(1,\); it must be a tuple of names"),
        ({"weight_granularity": "row"}, r"weight_granularity='row'; choose one of group, channel, tensor"),
        ({"weight_search": "hessian"}, r"weight_search='hessian'; choose one of absmax, mse"),
        ({"activation_granularity": None}, r"activation_granularity=None; choose one of token, tensor"),
        ({"scale_dtype": "float8"}, r"scale_dtype='float8'; choose one of float32, float16, bfloat16"),
        ({"indivisible": "pad"}, r"indivisible='pad'; choose one of error, divisor, keep"),
        ({"group_size": 0}, r"group_size=0; it must be an even whole number, such as 128"),
        ({"group_size": -128}, r"group_size=-128; it must be an even"),
        ({"group_size": 33}, r"group_size=33; it must be an even"),
        ({"group_size": 128.0}, r"group_size=128.0; it must be an even"),
        ({"group_size": "128"}, r"group_size='128'; it must be an even"),
        ({"group_size": True}, r"group_size=True; it must be an even"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_values_are_refused_in_a_sentence(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        QuantConfig(**fields)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match=message):
        QuantConfig.from_dict(asdict(QuantConfig()) | fields)


def test_a_field_from_the_future_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"QuantConfig does not know codebook, rotate; was it written by a newer version"
    ):
        QuantConfig.from_dict({"weight": "e2m1", "rotate": True, "codebook": 3})


@pytest.mark.parametrize("data", [None, [], "w4a6", 4])
def test_something_else_than_fields_is_refused(data: object) -> None:
    with pytest.raises(ValueError, match="expected a mapping of fields, found"):
        QuantConfig.from_dict(data)


def test_lists_become_tuples() -> None:
    config = QuantConfig(weight_candidates=["e2m1", "e3m0"], skip=["proj_out"])
    assert config.weight_candidates == ("e2m1", "e3m0")
    assert config.skip == ("proj_out",)
