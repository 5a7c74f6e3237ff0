"""Fine-tuning of scales with codes frozen."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torchao.quantization.granularity import PerGroup
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from fp4dit_ao import FP4DiTQuantizer, QuantConfig, capture, lower
from fp4dit_ao.observers import WeightObserver
from fp4dit_ao.observers.weight import weight_of
from fp4dit_ao.passes.fine_tuning import FineTuneConfig, run_fine_tuning, scale_tuning
from fp4dit_ao.passes.fine_tuning.training_state import TrainingState
from fp4dit_ao.passes.partition import weight_observers
from tests.graphs import TinyDiT, tiny_sample

QUICK = FineTuneConfig(steps=30, batch_size=2, lr=3e-3, save_every=10)


def samples() -> list[dict[str, Any]]:
    torch.manual_seed(1)
    return [
        {k: torch.randn_like(x) if x.is_floating_point() else x for k, x in tiny_sample().items()} for _ in range(4)
    ]


def prepared(**config: Any) -> GraphModule:
    torch.manual_seed(0)
    quantizer = FP4DiTQuantizer().set_global(QuantConfig(group_size=32, **config))
    return prepare_pt2e(capture(TinyDiT().eval(), samples()[0]), quantizer)


def outputs(graph: GraphModule) -> list[Tensor]:
    with torch.no_grad():
        return [graph(**sample)[0] for sample in samples()]


def error(graph: GraphModule, wanted: list[Tensor]) -> float:
    parts = [float((y - x).square().mean() / x.square().mean()) for y, x in zip(outputs(graph), wanted, strict=True)]
    return sum(parts) / len(parts)


@pytest.mark.parametrize("config", [{}, {"scale_dtype": "float16"}, {"weight": "nf4", "pre_gelu_weight": None}])
def test_the_converted_graph_errs_less_by_what_the_report_says(config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    wanted = outputs(capture(TinyDiT().eval(), samples()[0]))
    nearest = convert_pt2e(prepared(**config))
    graph = prepared(**config)
    report = run_fine_tuning(graph, samples(), "scales", QUICK, progress=False)
    codes = {o.name: o.codes for _, o in weight_observers(graph)}
    converted = convert_pt2e(graph)
    assert report.kept
    assert report.loss_before == pytest.approx(error(nearest, wanted), rel=1e-3)
    assert report.loss_after == pytest.approx(error(converted, wanted), rel=1e-3)
    assert report.loss_after < 0.97 * report.loss_before
    # other orders of summation, and so now and then another code of a token
    assert error(lower(converted), wanted) == pytest.approx(report.loss_after, rel=1e-2)
    # codes stay those of rounding to nearest
    for node, observer in weight_observers(prepared(**config)):
        assert torch.equal(observer.quantized(weight_of(prepared(**config), node))[0], codes[observer.name])


def test_the_gradient_is_that_of_the_scale() -> None:
    """d(level * s0 * exp(d)) / dd is the value itself, summed over the group."""
    torch.manual_seed(0)
    weight = torch.randn(4, 64)
    observer = WeightObserver("e2m1", PerGroup(32), name="fc.weight")
    module = scale_tuning.TunedScale(weight, observer)
    upstream = torch.randn(4, 64)
    (module(weight) * upstream).sum().backward()
    by_hand = (observer.dequantized(weight) * upstream).unflatten(1, (2, 32)).sum(-1)
    assert module.delta.grad is not None
    torch.testing.assert_close(module.delta.grad, by_hand)


def test_a_killed_run_resumes_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prepared()
    run_fine_tuning(whole, samples(), config=QUICK, progress=False)
    save = TrainingState.save

    def dies(self: TrainingState, state: Any, step: int) -> None:
        save(self, state, step)
        if step == 20:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingState, "save", dies)
    killed = prepared()
    with pytest.raises(KeyboardInterrupt):
        run_fine_tuning(killed, samples(), config=QUICK, checkpoint_dir=tmp_path, progress=False)
    assert [o.codes for _, o in weight_observers(killed)] == [None] * len(list(weight_observers(killed)))
    monkeypatch.setattr(TrainingState, "save", save)
    again = prepared()
    run_fine_tuning(again, samples(), config=QUICK, checkpoint_dir=tmp_path, progress=False)
    for (_, a), (_, b) in zip(weight_observers(whole), weight_observers(again), strict=True):
        assert torch.equal(a.scale, b.scale)
    with pytest.raises(ValueError, match="belongs to another run"):
        other = FineTuneConfig(steps=30, batch_size=2, lr=1e-3)
        run_fine_tuning(prepared(), samples(), config=other, checkpoint_dir=tmp_path, progress=False)


def test_what_cannot_be_tuned_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown fine-tuning 'lora'; choose one of bias_correction"):
        run_fine_tuning(prepared(), samples(), "lora")
    with pytest.raises(ValueError, match="no samples; collect_samples"):
        run_fine_tuning(prepared(), [])
    block = QuantConfig.from_name("mxfp4")
    graph = prepare_pt2e(capture(TinyDiT().eval(), samples()[0]), FP4DiTQuantizer().set_global(block))
    with pytest.raises(ValueError, match="are no free numbers"):
        run_fine_tuning(graph, samples())
    for wrong in ({"steps": 0}, {"lr": 0.0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="FineTuneConfig"):
            FineTuneConfig(**wrong)
