"""QuEST: which layers are chosen, by what, and the loss on their outputs."""

import pytest
import torch
from torch import nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from fp4dit_ao import FP4DiTQuantizer, QuantConfig, capture
from fp4dit_ao.passes.fine_tuning import FineTuneConfig, run_fine_tuning
from fp4dit_ao.passes.fine_tuning.biases import bias_of
from fp4dit_ao.passes.fine_tuning.blockwise import linears
from fp4dit_ao.passes.fine_tuning.quest import LayerLoss, chosen_layers, sensitivities, time_layers
from fp4dit_ao.passes.partition import weight_observers
from tests.graphs import TinyDiT, tiny_sample
from tests.passes.fine_tuning.methods import TimedDiT, lesson, prepared, samples


def fragile() -> GraphModule:
    """A graph whose output is for the most part that of ``blocks.1.ff.down``."""
    graph = prepared(QuantConfig(skip=(), pre_gelu_weight=None))
    graph.get_parameter("blocks.1.ff.down.weight").data.mul_(20)
    for _, observer in weight_observers(graph):
        observer.scale = None  # is found anew
    return graph


def names(layers: list[torch.fx.Node]) -> list[str]:
    return [str(node.args[2]).removesuffix("_bias") for node in layers]


def test_layers_that_see_the_timestep_alone_are_chosen_and_those_that_err_most() -> None:
    found = lesson(fragile(), FineTuneConfig(share=0.15))
    assert names(time_layers(found.prepared)) == ["time"]
    errors = sensitivities(found)
    assert len(errors) == 13
    assert names(sorted(errors, key=lambda node: -errors[node]))[0] == "blocks_1_ff_down"
    chosen = names(chosen_layers(found))
    assert "time" in chosen and "blocks_1_ff_down" in chosen
    total = sum(weight.numel() for weight in found.weights.values())
    sizes = {"ff_up": 2 * 128**2, "ff_down": 2 * 128**2}
    assert sum(sizes.get(name[9:], 128**2) for name in chosen if name != "time") <= 0.15 * total


def test_a_sensitivity_is_the_error_with_that_layer_alone_quantized() -> None:
    """Against the modules, with the one linear's weight and input rounded by its observers."""
    graph = prepared()
    found = lesson(graph)
    node = next(x for x in sensitivities(found) if names([x]) == ["blocks_0_ff_up"])
    inputs, weights = (graph.get_submodule(str(x.target)) for x in node.args[:2])
    model = TimedDiT().eval()
    wanted = [model(**sample)[0].detach() for sample in samples()]
    linear = model.blocks[0].ff.up
    linear.weight = nn.Parameter(weights.dequantized(linear.weight.detach()))
    linear.register_forward_pre_hook(lambda _, args: (inputs._quantize_dequantize(args[0].detach()),))
    with torch.no_grad():
        errors = [
            float((model(**sample)[0] - x).square().mean() / x.square().mean())
            for sample, x in zip(samples(), wanted, strict=True)
        ]
    assert sensitivities(found)[node] == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_the_loss_is_that_of_the_outputs_and_of_the_layers() -> None:
    """Layers' outputs in the float model are those of its modules."""
    found = lesson(prepared())
    wanted = ("time", "blocks.0.attn.to_v", "blocks.1.ff.down")
    layers = [node for node in linears(found.prepared) if names([node])[0] in {x.replace(".", "_") for x in wanted}]
    loss = LayerLoss(found, layers)
    model, kept = TimedDiT().eval(), {}
    for module in wanted:
        model.get_submodule(module).register_forward_hook(lambda _, __, y, name=module: kept.update({name: y}))
    model(**samples()[1])
    with torch.no_grad():
        _, quantized = loss.model.run(found.calls[1])
    by_tap = {node.name: names([node])[0] for node in layers}
    parts = []
    for tap, y in zip(loss.model.taps, quantized, strict=True):
        x = next(x for name, x in kept.items() if name.replace(".", "_") == by_tap[tap])
        parts.append(float((y - x).square().mean() / x.square().mean()))
    assert len(parts) == 3
    output = float(found.output_error(1).detach())
    assert float(loss(1).detach()) == pytest.approx(output + sum(parts) / 3, rel=1e-4)


def test_other_layers_stay_and_chosen_ones_biases_are_trained() -> None:
    graph = fragile()
    before = dict(graph.named_parameters())
    report = run_fine_tuning(graph, samples(), "quest", FineTuneConfig(steps=3, share=0.15), progress=False)
    assert report.kept
    trained = {o.name for _, o in weight_observers(graph) if o.codes is not None}
    assert {"time.weight", "blocks.1.ff.down.weight"} <= trained
    assert len(trained) < 13
    changed = {
        name for name, bias in before.items()
        if name.endswith("bias") and not torch.equal(bias, graph.get_parameter(name))
    }  # fmt: skip
    assert changed == {name.replace("weight", "bias") for name in trained}
    assert all(graph.get_parameter(name).requires_grad == p.requires_grad for name, p in before.items())
    assert bias_of(next(iter(graph.graph.nodes))) is None


def test_a_share_that_no_layer_fits_is_refused() -> None:
    data = [tiny_sample()]  # no layer sees the timestep alone
    graph = prepare_pt2e(capture(TinyDiT().eval(), data[0]), FP4DiTQuantizer().set_global(QuantConfig()))
    with pytest.raises(ValueError, match="less than its smallest layer"):
        run_fine_tuning(graph, data, "quest", FineTuneConfig(share=0.01), progress=False)
