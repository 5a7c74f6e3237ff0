"""Static ranges and formats by search: every candidate by NumPy, the reservoir, what a pipeline stores, refusals."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from fp4dit_ao import FP4DiTQuantizer, calibrate, capture, lower
from fp4dit_ao.checkpoint import graph_rebuilding
from fp4dit_ao.config import RECIPES, QuantConfig
from fp4dit_ao.formats import parse
from fp4dit_ao.observers.static_search import CALLS, VALUES, SearchedActivationObserver
from fp4dit_ao.passes.fine_tuning.activation_range import TunedRange
from tests.graphs import TinyDiT, tiny_sample

SEARCHED = replace(RECIPES["w4a6_lowbit_fp"](), skip=("p*",), weight_candidates=())


def test_range_and_format_are_the_best_of_all_candidates() -> None:
    """2 formats times 112 ranges, in NumPy, on values with heavy tails."""
    x = torch.randn(1, 8, 96, generator=torch.Generator().manual_seed(0)) ** 3
    observer = SearchedActivationObserver(("e2m3", "e3m2"))
    observer(x)
    values = x.numpy().astype(np.float64).flatten()
    found = []
    for name in ("e2m3", "e3m2"):
        levels = parse(name).lattice.numpy().astype(np.float64)
        for fraction in (1.0, *np.linspace(0.1, 1.2, 111)):
            step = fraction * np.abs(values).max() / levels.max()
            rounded = levels[np.abs(values[:, None] / step - levels).argmin(1)] * step
            found.append((((rounded - values) ** 2).sum(), name, step))
    error, name, step = min(found)
    scale = observer.scale(3)
    assert str(observer.fmt) == name
    assert scale.shape == (1, 1, 1)
    assert float(scale) == pytest.approx(step, rel=1e-5)
    observer.fake_quantize = True
    assert float((observer(x) - x).square().sum()) == pytest.approx(error, rel=1e-4)


def test_what_training_makes_of_the_range_is_on_top_of_the_search() -> None:
    observer = SearchedActivationObserver(("e2m3", "e3m2"))
    observer(torch.randn(1, 8, 96))
    found = observer.scale(2)
    ranged = TunedRange(observer)
    with torch.no_grad():
        ranged.log_factor.fill_(-0.5)
        trained = ranged(x := torch.randn(4, 96))
        ranged.settle()
    assert torch.allclose(observer.scale(2), found * math.exp(-0.5))
    observer.fake_quantize = True
    assert torch.allclose(observer(x), trained)


def test_the_reservoir_holds_calls_from_first_to_last() -> None:
    observer = SearchedActivationObserver("e2m3")
    for call in range(4 * CALLS):
        observer(torch.full((1, 2, VALUES), float(call)))
    calls = torch.stack(observer._kept)
    assert calls.shape == (CALLS, VALUES)
    kept = calls[:, 0]
    assert kept.unique().numel() == CALLS
    quarters = torch.bincount((kept // CALLS).long(), minlength=4)
    assert quarters.min() >= CALLS // 16, "each quarter of the calls, with 16 expected"


def test_a_graph_keeps_what_was_chosen() -> None:
    model, samples = TinyDiT().eval(), [tiny_sample(seed=seed) for seed in range(3)]
    quantizer = FP4DiTQuantizer().set_global(SEARCHED)
    with torch.no_grad():
        prepared = prepare_pt2e(capture(model, samples[0]), quantizer)
        calibrate(prepared, samples, progress=False)
        converted = convert_pt2e(prepared, fold_quantize=False)
        lowered = lower(converted)
        torch.testing.assert_close(lowered(**samples[0])[0], converted(**samples[0])[0], rtol=1e-4, atol=1e-5)
    chosen = {d.name: d.config for d in graph_rebuilding.resolve(quantizer.decisions.values(), lowered) if d.config}
    nodes = [n for n in lowered.graph.nodes if n.target is torch.ops.fp4dit_ao.fake_quantize.default]
    assert {config.activation for config in chosen.values()} == {n.args[3] for n in nodes} <= {"e2m3", "e3m2"}
    assert all(config.activation_candidates == () for config in chosen.values())


def test_refusals() -> None:
    with pytest.raises(ValueError, match="scales that are found online are not searched for: choose 'tensor'"):
        QuantConfig(activation_search="lowbit_fp")
    with pytest.raises(ValueError, match="chosen among by the search of static ranges; set activation_search"):
        QuantConfig(activation_candidates=("e2m3",), activation_granularity="tensor")
    with pytest.raises(ValueError, match="activation_candidates='e2m3'; it must be a tuple of names"):
        QuantConfig(activation_candidates="e2m3")
    with pytest.raises(RuntimeError, match=r"the static range at fc\.input saw no data"):
        SearchedActivationObserver("e2m3", name="fc.input").scale(2)
