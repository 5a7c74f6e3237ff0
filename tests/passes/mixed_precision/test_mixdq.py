"""MixDQ: errors of the model's output by two metrics, shares of a budget by hand, the nearest allocation, a resumed run."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from fp4dit_ao import FP4DiTQuantizer, QuantConfig, calibrate, capture
from fp4dit_ao.observers.weight import weight_of
from fp4dit_ao.passes.mixed_precision import (
    ALLOCATIONS,
    Choice,
    LayerChoices,
    choose_formats,
    format_choice,
    measures,
    sensitivity,
)
from fp4dit_ao.passes.mixed_precision.mixdq import RATIOS, MixDQ
from fp4dit_ao.passes.mixed_precision.sensitivity import Trials, dissimilarity
from fp4dit_ao.passes.partition import weight_observers
from tests.graphs import TinyDiT, tiny_sample

CONFIG = QuantConfig(weight_candidates=("e2m1", "int8"), activation="e3m4", pre_gelu_weight=None, attention=None)


def prepared() -> tuple[Any, list[dict[str, Any]], TinyDiT]:
    model, data = TinyDiT(), [tiny_sample(seed=seed, tokens=9) for seed in range(3)]
    graph = prepare_pt2e(capture(model, data[0]), FP4DiTQuantizer().set_global(CONFIG))
    calibrate(graph, data, progress=False)
    return graph, data, model


def open_layers(graph: Any) -> dict[str, Any]:
    return {o.name.removesuffix(".weight"): (o, weight_of(graph, node)) for node, o in weight_observers(graph)}


def test_dissimilarity_is_one_minus_ssim_in_windows() -> None:
    """Against NumPy, window by window, of latent images and of packed tokens."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, 9, 10, generator=generator)
    other = image + 0.3 * torch.randn(image.shape, generator=generator)
    tokens, changed = (x.flatten(2).mT for x in (image, other))

    def ssim(x: np.ndarray, y: np.ndarray, span: float) -> float:
        c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
        mx, my, vx, vy, cov = x.mean(), y.mean(), x.var(), y.var(), ((x - x.mean()) * (y - y.mean())).mean()
        return (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))

    span = float(image.max() - image.min())
    x, y = other.double().numpy(), image.double().numpy()
    windows = itertools.product(range(2), range(3), range(9 - 6), range(10 - 6))
    by_hand = [ssim(x[b, c, i : i + 7, j : j + 7], y[b, c, i : i + 7, j : j + 7], span) for b, c, i, j in windows]
    assert float(dissimilarity([other], [image])) == pytest.approx(1 - np.mean(by_hand), rel=1e-4)
    x, y = changed.double().numpy(), tokens.double().numpy()
    stretches = itertools.product(range(2), range(3), range(90 - 6))
    by_hand = [ssim(x[b, i : i + 7, c], y[b, i : i + 7, c], span) for b, c, i in stretches]
    assert float(dissimilarity([changed], [tokens])) == pytest.approx(1 - np.mean(by_hand), rel=1e-4)
    assert float(dissimilarity([image], [image])) == pytest.approx(0, abs=1e-5)


def test_a_layers_error_is_that_of_the_float_model_with_its_weight_alone_rounded() -> None:
    graph, data, model = prepared()
    layers = open_layers(graph)
    groups = {name: MixDQ().group(name) for name in layers}
    assert {name for name, group in groups.items() if group == "content"} == {"blocks.0.ff.up", "blocks.0.ff.down"}
    found = Trials(graph, layers, data).sensitivities(groups)
    with torch.no_grad():
        wanted = [model(**sample)[0] for sample in data]
        for name in ("blocks.0.attn.to_v", "blocks.0.ff.down"):
            observer, weight = layers[name]
            rounded = TinyDiT()  # a copy: the graph shares the model's parameters
            for fmt, error in zip(observer.candidates, found[name], strict=True):
                observer.choose(fmt, weight)
                rounded.get_parameter(f"{name}.weight").copy_(observer.dequantized(weight))
                outputs = [rounded(**sample)[0] for sample in data]
                if groups[name] == "quality":
                    parts = [(y - w).square().mean() / w.square().mean() for y, w in zip(outputs, wanted, strict=True)]
                else:
                    parts = [dissimilarity([y], [w]) for y, w in zip(outputs, wanted, strict=True)]
                assert error == pytest.approx(float(torch.stack(parts).mean()), rel=1e-3)
    assert all(errors[0] > 5 * errors[1] > 0 for errors in found.values()), "4 bits err more than 8"


def layer(name: str, weights: int, *errors: float) -> LayerChoices:
    return LayerChoices(name, weights, tuple(Choice(f"f{b}", float(b), e) for b, e in zip((4, 8), errors, strict=True)))


def test_budgets_of_the_groups() -> None:
    """Two quality and two content layers of one size, where each share of 24 bits is one allocation."""
    layers = [layer("a.attn1.q", 10, 0.9, 0.0), layer("b.attn1.q", 10, 0.1, 0.0)]
    layers += [layer("a.ff.up", 10, 5e-5, 0.0), layer("a.attn2.k", 10, 1e-5, 0.0)]
    found = MixDQ().candidates(layers, 6.0)
    bits = [[{"f4": 4, "f8": 8}[choice[x.name]] for x in layers] for choice in found]
    assert bits[0] == [8, 4, 8, 4], "equal shares first: the layer that needs it most in each group"
    for ratio in RATIOS:
        quality = 6.0 * 2 / (ratio + 1)  # rho = 1
        expected = [[4, 4], [8, 4]][quality >= 6 - 1e-9] + [[4, 4], [8, 4]][ratio * quality >= 6 - 1e-9]
        assert expected in bits
    assert all(sum(choice) <= 24 for choice in bits) and len(bits) == 3
    assert MixDQ()(layers, None) == {x.name: "f8" for x in layers}
    (one,) = MixDQ().candidates(layers[:2], 6.0)
    assert one == {"a.attn1.q": "f8", "b.attn1.q": "f4"}
    with pytest.raises(ValueError, match="cannot be met"):
        MixDQ().candidates(layers, 3.9)


def test_the_allocation_whose_output_is_nearest_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, data, model = prepared()
    offered: list[list[dict[str, str]]] = []
    original = MixDQ.candidates
    monkeypatch.setattr(MixDQ, "candidates", lambda *a: offered.append(original(*a)) or offered[-1])
    chosen = choose_formats(graph, "mixdq", 6.3, data)
    (found,) = offered
    assert len(found) > 1 and chosen in found
    errors = []
    with torch.no_grad():
        for formats in found:
            rounded = TinyDiT()
            for name, (observer, weight) in open_layers(graph).items():
                observer.choose(next(fmt for fmt in observer.candidates if str(fmt) == formats[name]), weight)
                rounded.get_parameter(f"{name}.weight").copy_(observer.dequantized(weight))
            pairs = [(rounded(**sample)[0], model(**sample)[0]) for sample in data]
            errors.append(sum(float((y - w).square().mean() / w.square().mean()) for y, w in pairs))
    assert chosen == found[int(np.argmin(errors))]
    assert choose_formats(graph, "mixdq", 6.3, data) == {}, "nothing is open any more"
    assert all(not o.paused and not o.fake_quantize for _, o in weight_observers(graph))
    assert bool(convert_pt2e(graph)(**data[0])[0].isfinite().all())


def test_a_killed_run_measures_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = choose_formats(prepared()[0], "mixdq", 6.3, prepared()[1])
    measured: list[str] = []
    original = Trials._alone

    def dies(self: Trials, observer: Any, *rest: Any) -> float:
        if len(measured) == 5:  # in the third layer
            raise KeyboardInterrupt
        measured.append(observer.name)
        return original(self, observer, *rest)

    monkeypatch.setattr(sensitivity.Trials, "_alone", dies)
    graph, data, _ = prepared()
    with pytest.raises(KeyboardInterrupt):
        choose_formats(graph, "mixdq", 6.3, data, checkpoint_dir=tmp_path)
    monkeypatch.setattr(
        sensitivity.Trials, "_alone", lambda self, o, *rest: measured.append(o.name) or original(self, o, *rest)
    )
    graph, data, _ = prepared()
    assert choose_formats(graph, "mixdq", 6.3, data, checkpoint_dir=tmp_path) == whole
    assert len(measured) == 5 + 8, "two of six layers were done"
    with pytest.raises(ValueError, match="belongs to another run"):
        choose_formats(prepared()[0], "mixdq", 6.3, data[:1], checkpoint_dir=tmp_path)


def test_what_needs_samples_says_so() -> None:
    assert measures("mixdq") and not measures("greedy")
    assert isinstance(ALLOCATIONS["mixdq"], format_choice.MeasuredAllocation)
    with pytest.raises(ValueError, match="no samples"):
        choose_formats(prepared()[0], "mixdq", 6.3)
