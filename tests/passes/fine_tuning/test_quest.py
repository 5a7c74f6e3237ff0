"""QuEST: which layers are chosen, by what, and the loss on their outputs."""

import pytest
import torch
from torch import nn

from fp4dit_ao.passes.fine_tuning import FineTuneConfig, quest, run_fine_tuning
from fp4dit_ao.passes.fine_tuning.quest import LayerLoss, chosen_layers, sensitivities, time_layers
from fp4dit_ao.passes.partition import quantized_linears, weight_observers
from tests.passes.fine_tuning.methods import TimedDiT, lesson, prepared, samples


def names(layers: list[torch.fx.Node]) -> list[str]:
    return [str(node.args[2]).removesuffix("_bias") for node in layers]


def test_layers_that_see_the_timestep_alone_are_chosen_and_those_that_err_most() -> None:
    """In the order of their errors, as long as they fit."""
    found = lesson(prepared(), FineTuneConfig(share=0.3))
    assert names(time_layers(found.prepared)) == ["time"]
    errors = sensitivities(found, quantized_linears(found.prepared))
    assert len(errors) == 13
    left = 0.3 * sum(weight.numel() for weight in found.weights.values())
    wanted = ["time"]
    for node in sorted(errors, key=lambda node: -errors[node]):
        (name,) = names([node])
        size = 2 * 128**2 if "ff" in name else 128**2
        if name != "time" and size <= left:
            wanted.append(name)
            left -= size
    chosen = names(chosen_layers(found))
    assert sorted(chosen) == sorted(wanted)
    assert 4 <= len(chosen) <= 7


def test_a_sensitivity_is_the_error_with_that_layer_alone_quantized() -> None:
    """Against the modules, with the one linear's weight and input rounded by its observers."""
    graph = prepared()
    found = lesson(graph)
    node = next(x for x in quantized_linears(found.prepared) if names([x]) == ["blocks_0_ff_up"])
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
    assert sensitivities(found, [node])[node] == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_the_loss_is_that_of_the_outputs_and_of_the_layers() -> None:
    """Layers' outputs in the float model are those of its modules."""
    found = lesson(prepared())
    wanted = ("time", "blocks.0.attn.to_v", "blocks.1.ff.down")
    layers = [
        node for node in quantized_linears(found.prepared) if names([node])[0] in {x.replace(".", "_") for x in wanted}
    ]
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
    config = FineTuneConfig(steps=3, batch_size=2, share=0.3)
    chosen = names(chosen_layers(lesson(prepared(), config)))
    graph = prepared()
    before = dict(graph.named_parameters())
    assert run_fine_tuning(graph, samples(), "quest", config, progress=False).kept
    trained = {o.name.removesuffix(".weight") for _, o in weight_observers(graph) if o.codes is not None}
    assert {name.replace(".", "_") for name in trained} == set(chosen)
    changed = {
        name for name, bias in before.items()
        if name.endswith("bias") and not torch.equal(bias, graph.get_parameter(name))
    }  # fmt: skip
    assert changed == {f"{name}.bias" for name in trained}
    assert all(graph.get_parameter(name).requires_grad == p.requires_grad for name, p in before.items())


def test_where_no_layer_fits_the_share_the_most_sensitive_one_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quest, "time_layers", lambda prepared: [])
    found = lesson(prepared(), FineTuneConfig(share=1e-6))
    errors = sensitivities(found, quantized_linears(found.prepared))
    assert chosen_layers(found) == [max(errors, key=errors.__getitem__)]
