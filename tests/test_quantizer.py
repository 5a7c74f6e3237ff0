"""Which edges FP4DiTQuantizer annotates, and how its rules combine."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from fp4dit_ao import FP4DiTQuantizer, QuantConfig, capture, w4a6
from fp4dit_ao.observers import StaticActivationObserver, TokenActivationObserver, WeightObserver
from fp4dit_ao.quantizer import reaches_gate
from tests.graphs import Attention, TinyDiT, tiny_sample

LINEARS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out", "ff.up", "ff.down"]


def graph(**kwargs) -> torch.fx.GraphModule:
    return capture(TinyDiT(**kwargs), tiny_sample(width=kwargs.get("width", 128)))


def formats(quantizer: FP4DiTQuantizer, captured: torch.fx.GraphModule) -> dict[str, str | None]:
    quantizer.annotate(captured)
    return {d.name: d.config.weight if d.config else None for d in quantizer.decisions.values() if d.kind == "linear"}


def test_the_paper_recipe() -> None:
    found = formats(FP4DiTQuantizer().set_global(w4a6()), graph())
    expected = {f"blocks.0.{name}": "e3m0" if name == "ff.up" else "e2m1" for name in LINEARS}
    assert found == expected | {"pos_embedder": None, "proj_out": None}


def test_the_last_rule_that_matches_wins() -> None:
    int4 = QuantConfig(weight="int4", pre_gelu_weight=None)
    quantizer = FP4DiTQuantizer().set_global(w4a6()).set_module_name("blocks.*", None)
    quantizer.set_module_type(Attention, int4).set_module_name("blocks.1.attn.to_q", w4a6())
    found = formats(quantizer, graph(layers=2))
    assert found["blocks.0.attn.to_q"] == "int4"
    assert found["blocks.1.attn.to_q"] == "e2m1"
    assert found["blocks.1.ff.up"] is None


def test_a_later_global_rule_overrides_a_name() -> None:
    quantizer = FP4DiTQuantizer().set_module_name("blocks.*", None).set_global(w4a6())
    assert formats(quantizer, graph())["blocks.0.attn.to_q"] == "e2m1"


def test_an_explicit_name_overrides_the_recipes_skip_list() -> None:
    quantizer = FP4DiTQuantizer().set_global(w4a6()).set_module_name("proj_out", w4a6())
    assert formats(quantizer, graph())["proj_out"] == "e2m1"


def test_a_pattern_leaves_what_the_recipe_skips_and_may_match_nothing() -> None:
    config = replace(w4a6(), activation="int8", pre_gelu_weight=None)
    quantizer = FP4DiTQuantizer().set_global(w4a6()).set_module_pattern("*.to_q", config)
    quantizer.set_module_pattern("proj_out", config).set_module_pattern("nowhere", config)
    found = formats(quantizer, graph())
    assert found["proj_out"] is None
    assert quantizer.decisions["proj_out"].reason == "recipe keeps 'proj_out*'"
    decided = {name: found.config.activation for name, found in quantizer.decisions.items() if found.config}
    assert {name for name, fmt in decided.items() if fmt == "int8"} == {"blocks.0.attn.to_q"}


class Experts(nn.Module):
    """Two experts in one parameter, used one by one or at once."""

    def __init__(self, at_once: bool):
        super().__init__()
        self.num_experts, self.at_once = 2, at_once
        self.weights = nn.Parameter(torch.randn(2, 128, 128))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.at_once:
            return x @ self.weights
        return torch.stack([x[i] @ self.weights[i] for i in range(2)])


@pytest.mark.parametrize("at_once", [True, False])
def test_experts_in_one_tensor_are_listed_as_left(at_once: bool) -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts, self.out = Experts(at_once), nn.Linear(128, 128)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.experts(x))

    quantizer = FP4DiTQuantizer().set_global(w4a6()).set_module_name("experts", None)  # which is a name that it has
    assert formats(quantizer, capture(Mixture(), {"x": torch.randn(2, 3, 128)})) == {"experts": None, "out": "e2m1"}
    assert quantizer.decisions["experts"].reason == "one tensor holds the weights of all its experts"


def test_set_module_type_takes_linears() -> None:
    quantizer = FP4DiTQuantizer().set_module_type(nn.Linear, replace(w4a6(), skip=(), indivisible="keep"))
    found = formats(quantizer, graph())
    assert found["pos_embedder"] is None
    assert found["proj_out"] == "e2m1"
    assert "groups of 128 do not divide" in quantizer.decisions["pos_embedder"].reason


def test_a_glob_that_matches_nothing_is_a_mistake() -> None:
    with pytest.raises(ValueError, match=r"matches no linear or attention .* did you mean 'proj_out'"):
        FP4DiTQuantizer().set_global(w4a6()).set_module_name("proj_uot", None).annotate(graph())


def test_nothing_to_quantize_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing in this graph would be quantized"):
        prepare_pt2e(graph(), FP4DiTQuantizer().set_global(None))


def test_a_group_that_does_not_divide_names_the_layer_and_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.to_q: groups of 128 do not divide its 96 .*indivisible"):
        FP4DiTQuantizer().set_global(w4a6()).annotate(graph(width=96))


def test_the_largest_divisor_on_request() -> None:
    quantizer = FP4DiTQuantizer().set_global(replace(w4a6(), indivisible="divisor"))
    quantizer.annotate(graph(width=96))
    assert quantizer.decisions["blocks.0.attn.to_q"].config.group_size == 96
    assert quantizer.decisions["blocks.0.ff.down"].config.group_size == 96


def observers(prepared: torch.fx.GraphModule, kind: type) -> list:
    return [m for m in dict(prepared.named_modules()).values() if isinstance(m, kind)]


def test_one_input_is_quantized_once() -> None:
    prepared = prepare_pt2e(graph(), FP4DiTQuantizer().set_global(w4a6()))
    assert len(observers(prepared, WeightObserver)) == 6
    # inputs: q/k/v together, out, up, down; then q, k and v themselves
    assert len(observers(prepared, TokenActivationObserver)) == 4 + 3


def test_two_formats_of_one_input_stay_two() -> None:
    quantizer = FP4DiTQuantizer().set_global(w4a6()).set_module_name("*.to_k", QuantConfig(activation="e3m2"))
    prepared = prepare_pt2e(graph(), quantizer)
    found = [str(o.fmt) for o in observers(prepared, TokenActivationObserver)]
    assert found.count("e3m2") == 1
    assert len(found) == 4 + 3 + 1


def test_static_ranges_and_weight_only() -> None:
    prepared = prepare_pt2e(graph(), FP4DiTQuantizer().set_global(replace(w4a6(), activation_granularity="tensor")))
    assert len(observers(prepared, StaticActivationObserver)) == 7
    prepared = prepare_pt2e(graph(), FP4DiTQuantizer().set_global(replace(w4a6(), activation=None, attention=None)))
    assert not observers(prepared, TokenActivationObserver)
    assert len(observers(prepared, WeightObserver)) == 6


class GEGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.after = nn.Linear(128, 256), nn.Linear(128, 128), nn.Linear(128, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.up(x).chunk(2, -1)
        return self.after(self.down(value * torch.nn.functional.gelu(gate)) + 1)


def test_a_gated_unit_is_found_through_its_chunk() -> None:
    captured = capture(GEGLU(), {"x": torch.randn(2, 3, 128)})
    linears = [n for n in captured.graph.nodes if n.target is torch.ops.aten.linear.default]
    assert [reaches_gate(node) for node in linears] == [True, False, False]


def test_a_shared_weight_is_observed_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(128, 128), nn.Linear(128, 128)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    prepared = prepare_pt2e(capture(Tied(), {"x": torch.randn(2, 128)}), FP4DiTQuantizer().set_global(w4a6()))
    assert len(observers(prepared, WeightObserver)) in (1, 2)
    assert torch.isfinite(prepared(torch.randn(3, 128))).all()
