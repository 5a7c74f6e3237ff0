"""Allocation of formats under a budget, against exhaustive search."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from fp4dit_ao import FP4DiTQuantizer, QuantConfig, calibrate, capture, lower
from fp4dit_ao.passes.mixed_precision import ALLOCATIONS, Choice, LayerChoices, choose_formats

BITS = (4.25, 8.25, 6.25)


@st.composite
def problems(draw: st.DrawFn) -> list[LayerChoices]:
    layers = []
    for index in range(draw(st.integers(1, 5))):
        count = draw(st.integers(1, 3))
        errors = draw(st.lists(st.floats(0, 1, width=32), min_size=count, max_size=count))
        choices = tuple(Choice(f"f{i}", BITS[i], error) for i, error in enumerate(errors))
        layers.append(LayerChoices(f"layer{index}", draw(st.integers(1, 1000)), choices))
    return layers


def totals(layers: list[LayerChoices], formats: dict[str, str]) -> tuple[float, float]:
    """(sum of errors, mean bits per weight) of an allocation."""
    picked = [next(c for c in layer.choices if c.fmt == formats[layer.name]) for layer in layers]
    weights = sum(layer.weights for layer in layers)
    bits = sum(layer.weights * choice.bits for layer, choice in zip(layers, picked, strict=True)) / weights
    return sum(choice.error for choice in picked), bits


def best(layers: list[LayerChoices], budget: float) -> float:
    """Least sum of errors within the budget, by trying everything."""
    names = [layer.name for layer in layers]
    tried = itertools.product(*([c.fmt for c in layer.choices] for layer in layers))
    found = (totals(layers, dict(zip(names, formats, strict=True))) for formats in tried)
    return min(error for error, bits in found if bits <= budget * (1 + 1e-9))


@settings(max_examples=60)
@given(problems(), st.floats(4.25, 9))
def test_the_integer_programme_is_optimal_and_greedy_keeps_the_budget(
    layers: list[LayerChoices], budget: float
) -> None:
    exact = ALLOCATIONS["integer_programme"](layers, budget)
    error, bits = totals(layers, exact)
    assert bits <= budget * (1 + 1e-6)
    assert error == pytest.approx(best(layers, budget), abs=1e-5)
    greedy_error, greedy_bits = totals(layers, ALLOCATIONS["greedy"](layers, budget))
    assert greedy_bits <= budget * (1 + 1e-6)
    assert greedy_error >= error - 1e-5


@settings(max_examples=30)
@given(problems())
def test_without_a_budget_all_take_the_least_error(layers: list[LayerChoices]) -> None:
    wanted = sum(min(choice.error for choice in layer.choices) for layer in layers)
    for allocation in ALLOCATIONS.values():
        assert totals(layers, allocation(layers, None))[0] == pytest.approx(wanted, abs=1e-6)


def test_budgets_that_cannot_be_met_are_refused() -> None:
    layers = [LayerChoices("fc", 10, (Choice("e2m1", 4.25, 0.1), Choice("int8", 8.25, 0.0)))]
    for name in ("greedy", "integer_programme"):
        with pytest.raises(ValueError, match=r"a budget of 4 bits per weight cannot be met: .* take 4.250"):
            ALLOCATIONS[name](layers, 4.0)
    with pytest.raises(ValueError, match="'least_error' keeps no budget"):
        ALLOCATIONS["least_error"](layers, 8.25)


class Pair(nn.Module):
    """Two linears; the first one's weights are levels of E2M1 as they are, so that wider codes gain nothing there."""

    def __init__(self) -> None:
        super().__init__()
        self.easy, self.hard = nn.Linear(64, 64), nn.Linear(64, 64)
        levels = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0])
        with torch.no_grad():
            self.easy.weight.copy_(levels[torch.randint(8, (64, 64))] / 64)
            self.easy.weight[:, ::32] = 12 / 64

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.hard(torch.tanh(self.easy(x)))


def prepared() -> tuple[torch.fx.GraphModule, torch.Tensor]:
    torch.manual_seed(0)
    model, x = Pair().eval(), torch.randn(32, 64)
    config = QuantConfig(weight_candidates=("e2m1", "int8"), group_size=32, pre_gelu_weight=None, skip=())
    graph = prepare_pt2e(capture(model, {"x": x}), FP4DiTQuantizer().set_global(config))
    calibrate(graph, [{"x": x}], progress=False)
    return graph, x


@pytest.mark.parametrize("allocation", ["greedy", "integer_programme"])
def test_a_graphs_bits_go_to_the_layer_that_needs_them(allocation: str) -> None:
    graph, x = prepared()
    # scales of 32 weights are float32: 5 bits and 9
    assert choose_formats(graph, allocation, 7.0) == {"easy": "e2m1", "hard": "e0m7"}
    lowered = lower(convert_pt2e(graph))
    assert {n: p.detach().fmt for n, p in lowered.named_parameters() if "weight" in n} == {
        "easy.weight": "e2m1",
        "hard.weight": "e0m7",
    }
    assert lowered(x)[0].isfinite().all()
    with pytest.raises(ValueError, match=r"the smallest formats of these layers take 5\.000"):
        choose_formats(prepared()[0], allocation, 4.9)


def test_what_needs_data_says_so() -> None:
    graph, x = prepared()
    config = QuantConfig(weight_candidates=("e2m1", "int8"), group_size=32, pre_gelu_weight=None, skip=())
    blank = prepare_pt2e(capture(Pair().eval(), {"x": x}), FP4DiTQuantizer().set_global(config))
    with pytest.raises(RuntimeError, match="choosing a weight format needs data"):
        choose_formats(blank)
    with pytest.raises(
        ValueError, match="unknown allocation 'best'; choose one of greedy, integer_programme, least_error"
    ):
        choose_formats(graph, "best")
    assert choose_formats(graph) == {"easy": "e2m1", "hard": "e0m7"}
    assert choose_formats(graph) == {}  # nothing is open any more
