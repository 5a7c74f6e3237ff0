"""The loop of all methods that train: less error, resumed with the same bits, nothing learned from held-out samples."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

from fp4dit_ao import lower
from fp4dit_ao.config import RECIPES
from fp4dit_ao.observers.activation import StaticActivationObserver
from fp4dit_ao.passes.fine_tuning import FineTuneConfig, distillation, run_fine_tuning
from fp4dit_ao.passes.fine_tuning.training_state import TrainingState
from fp4dit_ao.passes.partition import weight_observers
from fp4dit_ao.util.world import World
from tests.passes.fine_tuning.methods import TimedDiT, prepared, samples

TRAINED = ("efficientdm", "quest", "q_galore", "qvgen", "binarydm", "scales")


def error(graph: GraphModule, numbers: slice = slice(None)) -> float:
    model, total = TimedDiT().eval(), 0.0
    with torch.no_grad():
        for sample in samples()[numbers]:
            (wanted,), (found,) = model(**sample), graph(**sample)
            total += float((found - wanted).square().mean() / wanted.square().mean())
    return total / len(samples()[numbers])


def state_of(graph: GraphModule) -> list[torch.Tensor]:
    tensors = [x for _, o in weight_observers(graph) for x in (o.codes, o.scale) if x is not None]
    return [*tensors, *graph.parameters()]


@pytest.mark.parametrize("method", TRAINED)
def test_the_converted_graph_errs_less_by_what_the_report_says(method: str) -> None:
    graph = prepared()
    before = error(convert_pt2e(prepared()))
    report = run_fine_tuning(
        graph, samples(), method, FineTuneConfig(steps=12, batch_size=2, share=0.3), progress=False
    )
    converted = convert_pt2e(graph)
    assert report.kept
    assert report.held_out == 0
    assert report.state_bytes > 0
    assert report.loss_before == pytest.approx(before, rel=1e-3)
    assert report.loss_after == pytest.approx(error(converted), rel=1e-3)
    assert report.loss_after < 0.99 * before
    assert error(lower(converted)) == pytest.approx(report.loss_after, rel=1e-2)


@pytest.mark.parametrize(
    ("method", "recipe"),
    [("efficientdm", x) for x in ("w4a6_codebook", "int_w4a6", "nvfp4", "w4a6_static", "w4a6_lowbit_fp")]
    + [("qvgen", "nvfp4")],
)
def test_it_works_in_other_formats(method: str, recipe: str) -> None:
    graph = prepared(replace(RECIPES[recipe](), skip=()))
    report = run_fine_tuning(graph, samples(1), method, FineTuneConfig(steps=3, batch_size=1), progress=False)
    assert report.kept
    assert report.loss_after < report.loss_before
    if recipe == "w4a6_static" and method == "efficientdm":
        assert all(o.rounding is None for o in graph.modules() if hasattr(o, "absmax"))


@pytest.mark.parametrize("method", ["efficientdm", "quest", "q_galore", "qvgen", "binarydm"])
def test_a_killed_run_resumes_with_the_same_bits(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = FineTuneConfig(steps=4, batch_size=1, save_every=2, share=0.3, rank=4)
    whole = prepared()
    run_fine_tuning(whole, samples(), method, config, progress=False)
    save = TrainingState.save

    def dies(self: TrainingState, state: Any, step: int) -> None:
        save(self, state, step)
        raise KeyboardInterrupt

    killed = prepared()
    old = list(killed.parameters())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingState, "save", dies)
        run_fine_tuning(killed, samples(), method, config, checkpoint_dir=tmp_path, progress=False)
    assert all(a is b for a, b in zip(killed.parameters(), old, strict=True))
    assert all(o.rounding is None and o.codes is None for _, o in weight_observers(killed))
    again = prepared()
    run_fine_tuning(again, samples(), method, config, checkpoint_dir=tmp_path, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(state_of(whole), state_of(again), strict=True))
    with pytest.raises(ValueError, match="belongs to another run"):
        other = FineTuneConfig(steps=4, batch_size=1, save_every=2, share=0.3, rank=2)
        run_fine_tuning(prepared(), samples(), method, other, checkpoint_dir=tmp_path, progress=False)


def test_a_state_of_another_recipe_is_refused_and_saving_more_often_is_not(tmp_path: Path) -> None:
    """Nothing but formats of inputs differs between these recipes."""
    config, given = FineTuneConfig(steps=2, batch_size=1), {"checkpoint_dir": tmp_path, "progress": False}
    run_fine_tuning(prepared(replace(RECIPES["w4a6"](), skip=())), samples(1), "efficientdm", config, **given)
    again = prepared(replace(RECIPES["w4a6"](), skip=()))
    run_fine_tuning(
        again, samples(1), "efficientdm", replace(config, save_every=7, checkpoint_activations=False), **given
    )
    with pytest.raises(ValueError, match="belongs to another run"):
        run_fine_tuning(prepared(replace(RECIPES["w4a8"](), skip=())), samples(1), "efficientdm", config, **given)


def test_the_first_process_reads_and_writes_for_all(tmp_path: Path) -> None:
    class Second(World):
        rank, size = 1, 2

        def agreed(self, make: Any) -> Any:  # what the first process read
            return first.load()

    path, state = tmp_path / "state.safetensors", {"x": [torch.arange(3.0)]}
    first, second = TrainingState(path, "key", World()), TrainingState(path, "key", Second())
    second.save(state, 5)
    assert not path.exists() and second.load() == (None, 0)
    first.save(state, 5)
    found, step = second.load()
    assert step == 5 and torch.equal(found["x"][0], state["x"][0])


def test_held_out_samples_judge_and_are_not_learned_from(tmp_path: Path) -> None:
    config = FineTuneConfig(steps=2, batch_size=2, held_out=0.5)
    data = samples()
    changed = data[:2] + [{name: x + 1 for name, x in sample.items()} for sample in data[2:]]
    reports = [
        run_fine_tuning(prepared(), each, "efficientdm", config, checkpoint_dir=tmp_path / str(number), progress=False)
        for number, each in enumerate((data, changed))
    ]
    assert [report.held_out for report in reports] == [2, 2]
    assert reports[0].loss_before == pytest.approx(error(convert_pt2e(prepared()), slice(2, None)), rel=1e-3)
    assert reports[1].loss_before != reports[0].loss_before
    states = [load_file(tmp_path / str(number) / "efficientdm.safetensors") for number in range(2)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())


def test_what_does_not_help_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = prepared(RECIPES["w4a6_static"]())
    ranges = [float(o.scale(1)) for o in graph.modules() if isinstance(o, StaticActivationObserver)]
    biases = [p.clone() for p in graph.parameters()]
    # gradients uphill: the result is worse
    loss = distillation.relative_error
    monkeypatch.setattr(distillation, "relative_error", lambda *args: -loss(*args))
    config = FineTuneConfig(steps=2, batch_size=1, lr=0.5)
    report = run_fine_tuning(graph, samples(), "efficientdm", config, progress=False)
    assert not report.kept
    assert report.loss_after == report.loss_before
    assert "not lowered" in report.sentence()
    assert all(o.codes is None and not o.rescaled for _, o in weight_observers(graph))
    assert ranges == [float(o.scale(1)) for o in graph.modules() if isinstance(o, StaticActivationObserver)]
    assert all(torch.equal(a, b) for a, b in zip(biases, graph.parameters(), strict=True))


def test_keeping_blocks_inputs_alone_changes_no_bit() -> None:
    graphs = []
    for recompute in (True, False):
        graphs.append(prepared())
        config = FineTuneConfig(steps=2, batch_size=2, checkpoint_activations=recompute)
        run_fine_tuning(graphs[-1], samples(), "qvgen", config, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(*map(state_of, graphs), strict=True))


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"held_out": 1.0}, {"share": -0.1}, {"optimizer": "sgd"}, {"lr": 0.0}])
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"FineTuneConfig: {next(iter(wrong))}="):
        FineTuneConfig(**wrong)
