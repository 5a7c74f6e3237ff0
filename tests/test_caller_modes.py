"""``torch.inference_mode`` and ``torch.autocast`` of a caller: what is made in them is as good outside as any other."""

import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from fp4dit_ao import (
    ReconstructionConfig,
    calibrate,
    capture,
    collect_samples,
    example_inputs,
    load_pipeline,
    lower,
    quantize_modules,
    quantize_pipeline,
    quantizer_for,
    reconstruct,
)
from fp4dit_ao.deploy import exported_transformer
from fp4dit_ao.passes.device_placement import leave_inference_mode
from fp4dit_ao.util.plain_mode import plain_mode
from tests.diffusers_integration.test_everyday_calls import draw
from tests.tiny import CALL, tiny_pipeline

Mode = Callable[[], AbstractContextManager[Any]]

MODES: dict[str, Mode] = {
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.fixture(params=list(MODES))
def mode(request: pytest.FixtureRequest) -> Mode:
    return MODES[request.param]


def learned_graph() -> tuple[GraphModule, dict[str, Any]]:
    """A model that is made, captured, calibrated, learned and lowered here."""
    pipe = tiny_pipeline(layers=1)
    samples = collect_samples(pipe, ["a cat", "a dog"], samples=4, progress=False, **CALL)
    prepared = prepare_pt2e(capture(pipe.transformer, samples[0]), quantizer_for(pipe.transformer))
    calibrate(prepared, samples, progress=False)
    reconstruct(prepared, samples, ReconstructionConfig("scale_aware", iters=3), progress=False)
    return lower(convert_pt2e(prepared)), samples[0]


def prediction(model: nn.Module, sample: dict[str, Any]) -> Tensor:
    found: Tensor = model(**sample)[0]
    return found


def test_every_step_of_pt2e(mode: Mode) -> None:
    expected, sample = learned_graph()
    with mode():
        found, same = learned_graph()
    assert all(torch.equal(x, same[name]) for name, x in sample.items() if isinstance(x, Tensor))
    with torch.no_grad():
        assert torch.equal(prediction(found, sample), prediction(expected, sample))
    assert not any(x.is_inference() for x in (*found.parameters(), *found.buffers()))


def test_observers_and_samples_of_inference_mode() -> None:
    model = tiny_pipeline(layers=1).transformer
    with torch.inference_mode():
        samples = [example_inputs(model, seed=seed) for seed in range(4)]
        prepared = prepare_pt2e(capture(model, samples[0]), quantizer_for(model, "w4a6_static"))
        prepared(**samples[0])
    calibrate(prepared, samples, progress=False)
    report = reconstruct(prepared, samples, ReconstructionConfig("flexround", iters=3), progress=False)
    assert report.rows


def test_a_pipeline(mode: Mode, tmp_path: Path) -> None:
    def quantized() -> Any:
        return quantize_pipeline(tiny_pipeline(layers=1), prompts=["a cat"], samples=4, rounding="gptq", **CALL)

    expected = draw(quantized())
    with mode():
        found = quantized()
        found.save_pretrained(tmp_path)
        loaded = load_pipeline(tmp_path)
        exported_transformer.save_program(found.transformer, tmp_path / "model.pt2")
        program = exported_transformer.load(tmp_path / "model.pt2")
    assert torch.equal(draw(found), expected)
    assert torch.equal(draw(loaded), expected)
    sample = example_inputs(tiny_pipeline(layers=1).transformer)
    with torch.no_grad():
        assert torch.equal(program(**sample)[0], prediction(found.transformer, sample))
    with mode():
        found.transformer.to(torch.bfloat16)
        assert "bfloat16" in repr(found.transformer)
        state = pickle.loads(pickle.dumps(found.transformer)).state_dict()
    assert state.keys() == found.transformer.state_dict().keys()
    assert draw(load_pipeline(tmp_path, form="module").to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["graph", "module"])
def test_gradients_and_moves_after_a_first_call_in_inference_mode(form: str, tmp_path: Path) -> None:
    model: Any = tiny_pipeline(layers=1).transformer
    sample = example_inputs(model)
    if form == "graph":
        model = quantize_pipeline(
            tiny_pipeline(layers=1), prompts=["a cat"], samples=4, rounding="nearest", **CALL
        ).transformer
    else:
        with torch.inference_mode():
            model = quantize_modules(tiny_pipeline(layers=1).transformer)
    with torch.inference_mode():
        first = prediction(model, sample)
    sample["hidden_states"] = torch.Tensor(sample["hidden_states"]).requires_grad_()
    second = prediction(model, sample)
    assert torch.equal(first, second)
    [gradient] = torch.autograd.grad(second.square().sum(), [sample["hidden_states"]])
    assert gradient.isfinite().all()
    assert gradient.any()
    if form == "graph":
        model.to("cpu").to(torch.float64)
    with torch.inference_mode():
        model.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").exists()


def test_the_mode_of_the_caller_comes_back() -> None:
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        with plain_mode():
            assert not (
                torch.is_inference_mode_enabled() or torch.is_autocast_enabled("cpu") or torch.is_grad_enabled()
            )
            assert not torch.ones(1).is_inference()
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
    with torch.no_grad(), plain_mode():
        assert not torch.is_grad_enabled()
    with plain_mode():
        assert torch.is_grad_enabled()


def test_only_tensors_of_inference_mode_are_replaced() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.inference_mode():
        model[1] = nn.Linear(2, 2)
    before = [x.detach().clone() for x in model.parameters()]
    kept = model[0].weight.data_ptr()
    assert leave_inference_mode(model) is model
    assert model[0].weight.data_ptr() == kept
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), before, strict=True))
    assert all(x.requires_grad and not x.is_inference() for x in model.parameters())
