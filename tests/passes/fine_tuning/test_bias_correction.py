"""Bias correction: mean errors by hand, in the order of the graph; after any rounding; kept only where the model errs less."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from fp4dit_ao import FP4DiTQuantizer, QuantConfig, ReconstructionConfig, capture, lower, reconstruct
from fp4dit_ao.config import RECIPES
from fp4dit_ao.passes.fine_tuning import FineTuneConfig, bias_correction, run_fine_tuning
from fp4dit_ao.passes.partition import weight_observers
from tests.graphs import TinyDiT, tiny_sample

BATCHES = (2, 3, 1)


def samples(offset: float = 0.3) -> list[dict[str, Tensor]]:
    found = [tiny_sample(batch=batch, seed=seed) for seed, batch in enumerate(BATCHES)]
    return [{name: x + offset for name, x in sample.items()} for sample in found]


def prepared(config: QuantConfig, layers: int = 1) -> tuple[GraphModule, TinyDiT]:
    model = TinyDiT(layers=layers).eval()
    graph = prepare_pt2e(capture(model, samples()[0]), FP4DiTQuantizer().set_global(config))
    with torch.no_grad():
        for sample in samples():
            graph(**sample)
    return graph, model


class Linears(torch.fx.Interpreter):
    """Outputs of a graph's linears for all samples at once, by name of the module."""

    def __init__(self, graph: GraphModule):
        super().__init__(graph)
        self.found: dict[str, Tensor] = {}
        with torch.no_grad():
            self.run(*(torch.cat([sample[name] for sample in samples()]) for name in samples()[0]), True)

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        if n.target is torch.ops.aten.linear.default:
            self.found[list(n.meta["nn_module_stack"].values())[-1][0]] = value.flatten(0, -2)
        return value

    def means(self) -> dict[str, np.ndarray]:
        return {name: x.double().mean(0).numpy() for name, x in self.found.items()}


def error(graph: GraphModule, model: nn.Module) -> float:
    with torch.no_grad():
        parts = [
            float((graph(**s)[0] - model(**s)[0]).square().mean() / model(**s)[0].square().mean()) for s in samples()
        ]
    return sum(parts) / len(parts)


@pytest.mark.parametrize("recipe", ["w4a6", "int_w4a6", "w4a6_codebook", "nvfp4", "w4a6_static"])
def test_afterwards_every_quantized_linear_has_the_mean_of_the_float_one(recipe: str) -> None:
    """Each in the model whose linears before it are quantized and corrected, which the converted graph is; all rows at a time,
    since the scale of an NVFP4 tensor is that of a batch."""
    graph, model = prepared(RECIPES[recipe]())
    nearest = convert_pt2e(copy.deepcopy(graph))
    report = run_fine_tuning(
        graph, samples(), "bias_correction", FineTuneConfig(batch_size=sum(BATCHES)), progress=False
    )
    converted = convert_pt2e(graph)
    wanted, before, after = (Linears(x).means() for x in (capture(model, samples()[0]), nearest, converted))
    quantized = [name for name in wanted if name.startswith("blocks.")]
    assert len(quantized) == 6
    for name in quantized:
        scale = np.abs(wanted[name]).max()
        assert np.abs(before[name] - wanted[name]).max() > 1e-3 * scale
        # another order of summation now and then gives a token another code
        np.testing.assert_allclose(after[name], wanted[name], rtol=0, atol=3e-4 * scale)
    assert report.kept
    assert report.loss_before == pytest.approx(error(nearest, model), rel=1e-2)
    assert report.loss_after == pytest.approx(error(converted, model), rel=1e-2)
    assert report.loss_after < report.loss_before
    assert report.parameters == sum(model.get_submodule(name).bias.numel() for name in quantized)


def test_it_follows_whatever_rounding_was_chosen() -> None:
    graph, model = prepared(QuantConfig())
    reconstruct(graph, samples(), ReconstructionConfig("gptq"), progress=False)
    solved = error(convert_pt2e(copy.deepcopy(graph)), model)
    codes = [observer.codes for _, observer in weight_observers(graph)]
    report = run_fine_tuning(graph, samples(), "bias_correction", progress=False)
    assert report.loss_before == pytest.approx(solved, rel=1e-3)
    assert report.loss_after < solved
    assert all(a is b for a, b in zip(codes, (observer.codes for _, observer in weight_observers(graph)), strict=True))


@torch.no_grad()
def test_the_captured_model_keeps_its_biases_and_the_lowered_graph_has_the_new_ones() -> None:
    graph, model = prepared(QuantConfig())
    old = {name: bias.clone() for name, bias in model.named_parameters() if name.endswith("bias")}
    trained = {name: p.requires_grad for name, p in graph.named_parameters()}
    run_fine_tuning(graph, samples(), "bias_correction", progress=False)
    assert all(torch.equal(model.get_parameter(name), bias) for name, bias in old.items())
    assert {name: p.requires_grad for name, p in graph.named_parameters()} == trained
    changed = {name for name, bias in old.items() if not torch.equal(graph.get_parameter(name), bias)}
    assert changed == {name for name in old if name.startswith("blocks.")}
    bias = graph.get_parameter("blocks.0.ff.up.bias").clone()
    assert torch.equal(lower(convert_pt2e(graph)).get_parameter("blocks.0.ff.up.bias"), bias)


def test_what_does_not_help_is_undone() -> None:
    graph, model = prepared(QuantConfig())
    patched = pytest.MonkeyPatch()
    worse = lambda old, *rest: {name: nn.Parameter(bias + 1, requires_grad=False) for name, bias in rest[1].items()}  # noqa: E731
    with patched.context() as patch:
        patch.setattr(bias_correction, "_corrected", worse)
        report = run_fine_tuning(graph, samples(), "bias_correction", progress=False)
    assert not report.kept
    assert report.loss_after == report.loss_before
    assert torch.equal(graph.get_parameter("blocks.0.ff.up.bias"), model.blocks[0].ff.up.bias)


def test_half_precision_and_biases_that_are_shared_or_missing() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(self.one(x)))

    torch.manual_seed(0)
    data = [{"x": torch.randn(2, 5, 64)}]
    config = QuantConfig(group_size=32, skip=())
    graph = prepare_pt2e(capture(Shared().eval(), data[0]), FP4DiTQuantizer().set_global(config))
    with pytest.raises(ValueError, match="no quantized linear of this graph has a bias of its own"):
        run_fine_tuning(graph, data, "bias_correction", progress=False)
    half = TinyDiT().bfloat16().eval()
    data = [{name: x.bfloat16() for name, x in sample.items()} for sample in samples()]
    graph = prepare_pt2e(capture(half, data[0]), FP4DiTQuantizer().set_global(QuantConfig()))
    report = run_fine_tuning(graph, data, "bias_correction", FineTuneConfig(batch_size=2), progress=False)
    assert report.kept
    assert graph.get_parameter("blocks.0.ff.up.bias").dtype == torch.bfloat16
    with pytest.raises(ValueError, match="no samples; collect_samples"):
        run_fine_tuning(graph, [], "bias_correction")
