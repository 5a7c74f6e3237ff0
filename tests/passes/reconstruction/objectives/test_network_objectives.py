"""Objectives that look beyond a unit's output, at its linears and at the model's: each against the float model by hand."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from fp4dit_ao import FP4DiTQuantizer, QuantConfig, ReconstructionConfig, capture, reconstruct
from fp4dit_ao.config import RECIPES
from fp4dit_ao.passes.partition import weight_observers
from fp4dit_ao.passes.reconstruction import engine
from fp4dit_ao.passes.reconstruction.objectives import OBJECTIVES, Errors, LayerWeighted, PredictionDifference
from fp4dit_ao.passes.reconstruction.unit_error import rounding_by
from tests.graphs import TinyDiT
from tests.passes.reconstruction.test_reconstruct import codes, error, prepare, samples

NEW = ["layer_weighted", "prediction_difference"]


@pytest.fixture(scope="module")
def stacked() -> dict[str, Tensor]:
    return {name: torch.cat([sample[name] for sample in samples()]) for name in samples()[0]}


def judged(objective: str) -> tuple[list[Any], nn.Module, GraphModule]:
    """What the objective says of nearest rounding, the float model, and the converted graph."""
    prepared, data, model = prepare(layers=2)
    config = ReconstructionConfig("nearest", objective=objective, batch_size=3)
    return reconstruct(prepared, data, config, progress=False).rows, model, convert_pt2e(prepared)


class Watch(torch.fx.Interpreter):
    """A run of a graph that keeps the last linear's or sum's value of every module.

    Attributes:
        found: by the module's name.
    """

    def __init__(self, graph: GraphModule, inputs: dict[str, Tensor]):
        super().__init__(graph)
        self.found: dict[str, Tensor] = {}
        self.run(*inputs.values(), True)

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        if n.target in (torch.ops.aten.linear.default, torch.ops.aten.add.Tensor):
            self.found[list(n.meta["nn_module_stack"].values())[-1][0]] = value
        return value


def outputs_of_modules(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, a, y, name=name: found.__setitem__(name, y))
    model(**inputs)
    return found


def relative(x: Tensor, reference: Tensor) -> Tensor:
    return (x - reference).square().mean() / reference.square().mean()


@torch.no_grad()
def test_layer_weighted_is_the_block_and_its_linears(stacked) -> None:
    """``(MSE(block) + sum MSE(linear)) / power(block)``; the second block's input is quantized."""
    rows, model, converted = judged("layer_weighted")
    quantized, full = Watch(converted, stacked).found, outputs_of_modules(model, stacked)
    for index, row in enumerate(rows):
        block = f"blocks.{index}"
        names = [name for name, x in model.named_modules() if isinstance(x, nn.Linear) and name.startswith(f"{block}.")]
        assert len(names) == 6
        total = sum((quantized[name] - full[name]).square().mean() for name in (block, *names))
        assert row.loss_before == pytest.approx(float(total / full[block].square().mean()), rel=1e-4)


@torch.no_grad()
def test_prediction_difference_goes_through_the_float_rest_of_the_network(stacked) -> None:
    rows, model, converted = judged("prediction_difference")
    quantized, full = Watch(converted, stacked).found, outputs_of_modules(copy.deepcopy(model), stacked)
    for index, row in enumerate(rows):
        hidden = quantized[f"blocks.{index}"]
        expected = relative(hidden, full[f"blocks.{index}"])
        for block in model.blocks[index + 1 :]:
            hidden = block(hidden, stacked["shift"])
        expected = expected + relative(model.proj_out(hidden), full["proj_out"])
        assert row.loss_before == pytest.approx(float(expected), rel=1e-4)


def test_how_errors_are_combined() -> None:
    errors = Errors(
        [torch.tensor(1.0), torch.tensor(3.0)], [torch.tensor(0.5)] * 4, [torch.tensor(8.0), torch.tensor(2.0)]
    )
    assert float(OBJECTIVES["mse"].combined(errors)) == 2
    assert float(LayerWeighted(0.8).combined(errors)) == pytest.approx(2 + 0.8 * 4 * 0.5)
    assert float(PredictionDifference(0.1).combined(errors)) == pytest.approx(2 + 0.1 * 5)
    assert float(LayerWeighted().combined(Errors([torch.tensor(1.0)]))) == 1


@pytest.mark.parametrize("objective", NEW)
def test_gradients_are_those_of_the_whole(objective: str) -> None:
    """A step of learning on one weight, against a difference quotient."""
    prepared, data, _ = prepare(layers=2)
    seen: list[Any] = []

    def look(found: Any, rule: Any, config: Any, index: int, bar: Any) -> Any:
        seen.append((index, derivative(found)))
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, "round_unit", look)
        reconstruct(prepared, data, ReconstructionConfig(objective=objective, batch_size=8), progress=False)
    ((_, (gradient, quotient)),) = seen
    assert gradient == pytest.approx(quotient, rel=2e-3)


def derivative(found: Any) -> tuple[float, float]:
    """That of the unit's error in a shift of the last linear's weight, which no quantized input follows in the unit."""

    class Shifted(nn.Module):
        def __init__(self, weight: Tensor):
            super().__init__()
            self.register_buffer("weight", weight)
            self.shift = nn.Parameter(torch.zeros((), dtype=weight.dtype))

        def forward(self, weight: Tensor) -> Tensor:
            return self.weight + self.shift * torch.ones_like(self.weight)

    observer = next(o for o in found.weights if o.name.endswith("ff.down.weight"))
    module = Shifted(observer.dequantized(found.weights[observer]))
    everything = slice(0, found.shards.total_rows)
    with rounding_by({observer: module}):
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(found.of(found.gather(0, everything), found.graph), module.shift)
        values = []
        for shift in (1e-2, -1e-2):
            module.shift.data.fill_(shift)
            with torch.no_grad():
                values.append(float(found.of(found.gather(0, everything), found.graph)))
    return float(gradient), (values[0] - values[1]) / 2e-2


def quick(objective: str, iters: int, **settings: Any) -> ReconstructionConfig:
    """Few short steps that round hard, on all rows: the best of them is never worse than the start."""
    return ReconstructionConfig("sign_gradient", objective=objective, iters=iters, batch_size=8, lr=0.02, **settings)


@pytest.mark.parametrize(
    ("objective", "scope", "layers"),
    [("layer_weighted", "window", 2), ("prediction_difference", "window", 2), ("prediction_difference", "layer", 1)],
)
def test_learned_rounding_lowers_it_in_every_scope(objective: str, scope: str, layers: int) -> None:
    prepared, data, model = prepare(layers=layers)
    nearest = error(convert_pt2e(copy.deepcopy(prepared)), model, data)
    report = reconstruct(prepared, data, quick(objective, 8, scope=scope), progress=False)
    assert all(row.loss_after <= row.loss_before for row in report.rows)
    assert any(row.kept == "learned" for row in report.rows)
    assert error(convert_pt2e(prepared), model, data) < 0.9 * nearest


@pytest.mark.parametrize("objective", NEW)
@pytest.mark.parametrize("recipe", ["int_w4a6", "w4a6_codebook", "nvfp4"])
def test_every_format(objective: str, recipe: str) -> None:
    prepared, data, _ = prepare(RECIPES[recipe]())
    row = reconstruct(prepared, data, quick(objective, 8), progress=False).rows[0]
    assert row.kept == "learned"
    assert row.loss_after < row.loss_before


def test_the_prediction_sways_the_choice() -> None:
    """Where the rest of the network looks at few channels, rounding for the prediction errs less there than for the block."""
    model = TinyDiT(layers=1)
    with torch.no_grad():
        model.proj_out.weight[:, 8:] = 0
    data = samples(4)
    found = {}
    for objective in ("mse", "prediction_difference"):
        prepared = prepare_pt2e(capture(model, data[0]), FP4DiTQuantizer().set_global(QuantConfig()))
        reconstruct(prepared, data, quick(objective, 25), progress=False)
        found[objective] = error(convert_pt2e(prepared), model, data)
    assert found["prediction_difference"] < 0.9 * found["mse"]


@pytest.mark.parametrize("objective", NEW)
def test_a_killed_run_resumes_with_the_same_bits(
    objective: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, data, _ = prepare(layers=2)
    killed = copy.deepcopy(whole)
    config = quick(objective, 6)
    reconstruct(whole, data, config, progress=False)
    done: list[int] = []
    original = engine.round_unit

    def dies(*args: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return original(*args)

    monkeypatch.setattr(engine, "round_unit", dies)
    with pytest.raises(KeyboardInterrupt):
        reconstruct(killed, data, config, checkpoint_dir=tmp_path, progress=False)
    monkeypatch.setattr(engine, "round_unit", original)
    reconstruct(killed, data, config, checkpoint_dir=tmp_path, progress=False)
    pairs = list(zip(codes(whole), codes(killed), strict=True))  # None where nearest rounding was kept
    assert all(torch.equal(a, b) if a is not None and b is not None else a is b for a, b in pairs)
    assert any(a is not None for a, _ in pairs)


def test_values_that_an_objective_needs_are_let_go_of() -> None:
    """Full-precision inputs of one unit at a time, and none without need; the graph is left as it was."""
    peaks = {}
    for objective in ("mse", "layer_weighted"):
        prepared, data, model = prepare(layers=2)
        report = reconstruct(prepared, data, ReconstructionConfig("nearest", objective=objective), progress=False)
        peaks[objective] = report.stream_bytes
        with torch.no_grad():
            assert torch.equal(prepared(**data[0])[0], model(**data[0])[0])
        assert all(not observer.paused for _, observer in weight_observers(prepared))
    value = 4 * 8 * 6 * 128  # bytes of a block's input
    assert 0 <= peaks["layer_weighted"] - peaks["mse"] <= value
