"""Every recipe means one scheme, and a scheme's forms of a weight agree."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from fp4dit_ao import FP4DiTQuantizer, QuantConfig, capture, w4a6
from fp4dit_ao.checkpoint.graph_tensors import flatten
from fp4dit_ao.config import RECIPES, scheme_rules
from fp4dit_ao.config.scheme_rules import RULES
from fp4dit_ao.ops import dequantize
from fp4dit_ao.schemes import SCHEMES, owner_of, register_scheme, scheme_of
from fp4dit_ao.schemes.grouped import GroupedScheme

SCHEME_OF = {
    "w4a4_codebook": "codebook_groups",
    "w4a6_codebook": "codebook_groups",
    "w4a8_codebook": "codebook_groups",
    "nvfp4": "block_scaled",
    "nvfp4_four_over_six": "block_scaled",
    "nvfp4_four_over_six_both": "block_scaled",
    "mxfp4": "block_scaled",
    "mxfp6_e2m3": "block_scaled",
    "mxfp6_e3m2": "block_scaled",
}
RESOLVED = {name: replace(QuantConfig.from_name(name), weight_candidates=()) for name in RECIPES}


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(48, 256, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", RECIPES)
def test_which_scheme_a_recipe_means(name: str) -> None:
    config = QuantConfig.from_name(name)
    assert config.scheme == SCHEME_OF.get(name, "grouped")
    assert scheme_of(config) is SCHEMES[config.scheme]
    assert [info.name for info in SCHEMES.infos()] == list(SCHEMES)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_parts_are_as_described_and_make_the_weight_again(name: str, dtype, weight) -> None:
    config = RESOLVED[name]
    scheme = scheme_of(config)
    rounded = scheme.round_to_nearest("fc", weight.to(dtype), config)
    parts = {key.removeprefix("fc."): part for key, part in flatten("fc", rounded).items()}
    empty = scheme.empty_parts(weight.shape, config)
    assert {k: (x.shape, x.dtype) for k, x in parts.items()} == {k: (x.shape, x.dtype) for k, x in empty.items()}
    assert all(x.is_meta for x in empty.values())
    again = scheme.from_parts(parts, config, dtype)
    assert type(again) is type(rounded)
    assert again.dtype == rounded.dtype == dtype
    assert torch.equal(again.dequantize(torch.float32), rounded.dequantize(torch.float32))
    assert owner_of(rounded) is scheme
    assert torch.equal(scheme.nearest_codes(rounded, weight.to(dtype)), rounded.codes)


@pytest.mark.parametrize("name", RECIPES)
def test_the_converted_graph_and_the_tensor_have_one_weight(name: str, weight) -> None:
    """The observer in a graph, and rounding without one."""
    config = replace(RESOLVED[name], pre_gelu_weight=None, skip=())
    rounded = scheme_of(config).round_to_nearest("fc", weight, config)
    module = torch.nn.Sequential(torch.nn.Linear(256, 48, bias=False)).requires_grad_(False)
    module[0].weight.copy_(weight)
    x = {"input": torch.randn(2, 3, 256)}
    prepared = prepare_pt2e(capture(module, x), FP4DiTQuantizer().set_global(config))
    prepared(**x)
    converted = convert_pt2e(prepared)
    assert torch.equal(_stored(converted), rounded.dequantize(torch.float32))


def _stored(graph: GraphModule) -> torch.Tensor:
    """The weight that a converted graph of one linear multiplies with."""
    (linear,) = [node for node in graph.graph.nodes if node.target is torch.ops.aten.linear.default]
    return _evaluate(graph, linear.args[1])


def _evaluate(graph: GraphModule, node) -> torch.Tensor:
    if not isinstance(node, torch.fx.Node):
        return node
    if node.op == "get_attr":
        return graph.get_buffer(node.target)
    return node.target(*(_evaluate(graph, argument) for argument in node.args))


def test_a_weight_of_no_scheme_has_no_owner(weight) -> None:
    assert owner_of(weight) is None


@pytest.mark.parametrize(("name", "online"), [("w4a6", True), ("w4a6_static", False), ("nvfp4", True)])
def test_what_needs_no_calibration(name: str, online: bool) -> None:
    config = QuantConfig.from_name(name)
    assert scheme_of(config).quantizes_online(config) is online


class HalvedRules:
    """Claims what it is told to, for a scheme that a test adds."""

    name = "halved"

    def claims(self, config: QuantConfig) -> bool:
        return config.group_size == 14

    def check(self, config: QuantConfig) -> None:
        if config.weight != "e2m1":
            raise ValueError(f"QuantConfig: weight={config.weight!r}; halved weights are E2M1")


class Halved(GroupedScheme):
    rules = HalvedRules()


@pytest.fixture
def halved() -> Iterator[Halved]:
    scheme = register_scheme(Halved(), summary="a test")
    yield scheme
    RULES.remove(scheme.rules)
    del SCHEMES._methods["halved"], SCHEMES._infos["halved"]


def test_another_scheme_is_one_object(halved, weight) -> None:
    config = replace(w4a6(), group_size=14)
    assert scheme_of(config) is halved
    assert scheme_of(w4a6()) is SCHEMES["grouped"]
    with pytest.raises(ValueError, match="halved weights are E2M1"):
        replace(config, weight="e3m0")
    small = weight[:, :140]
    rounded = halved.round_to_nearest("fc", small, config)
    expected = dequantize(rounded.codes, [1, 14], rounded.scale, "e2m1", torch.float32)
    assert torch.equal(rounded.dequantize(), expected)
    with pytest.raises(ValueError, match="another quantization scheme named 'halved'"):
        register_scheme(Halved(), summary="again")


def test_rules_are_asked_in_order() -> None:
    assert scheme_rules.RULES[-1].claims(w4a6()), "the last claims what is left"
    assert {rules.name for rules in scheme_rules.RULES} == set(SCHEMES)
