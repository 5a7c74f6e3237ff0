"""Balancing of PTQ4DiT and ViDiT-Q: factors by NumPy and SciPy, linears that are left alone, records."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from fp4dit_ao import capture, transform
from fp4dit_ao.config import RECIPES
from fp4dit_ao.passes.transforms.momentum_balance import MomentumBalance
from fp4dit_ao.passes.transforms.outlier_scaling import OutlierScaling, channel_bound
from fp4dit_ao.passes.transforms.salience_balance import SalienceBalance, mean_salience, rank_correlation
from fp4dit_ao.passes.transforms.smoothquant import SmoothQuant
from tests.graphs import show
from tests.passes.transforms.layers import Layer, quantized, relative

E2M1 = replace(RECIPES["w4a6_e2m1"](), skip=())


def samples_in_time(seed: int = 0, width: int = 128) -> tuple[Layer, list[dict[str, Tensor]]]:
    """Inputs whose outliers wander from channel to channel over four samples, and weights with large columns."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = Layer(width).eval()
    samples = [{"x": torch.randn(2, 16, width, generator=generator)} for _ in range(5)]
    for step, sample in enumerate(samples):
        sample["x"][..., [3, 11, 20 + step % 4]] *= 60
    return model, samples


def absmax(samples: list[dict[str, Tensor]]) -> np.ndarray:
    return np.stack([sample["x"].abs().amax((0, 1)).numpy() for sample in samples]).astype(np.float64)


def normalised(t: np.ndarray) -> Tensor:
    """``1 / t`` as it is stored: of geometric mean 1, in bfloat16."""
    factors = 1 / t
    return torch.tensor(factors / np.exp(np.log(factors).mean())).float().bfloat16().float()


def test_correlations_are_spearmans() -> None:
    x, y = (torch.randn(40, generator=torch.Generator().manual_seed(seed)).exp() for seed in range(2))
    assert float(rank_correlation(x, y)) == pytest.approx(
        scipy.stats.spearmanr(x.numpy(), y.numpy()).statistic, abs=1e-6
    )
    assert float(rank_correlation(x, x)) == pytest.approx(1)
    assert float(rank_correlation(x, -x)) == pytest.approx(-1)


def test_timesteps_that_complement_the_weight_count_more() -> None:
    columns = torch.tensor([1.0, 2, 3, 4])
    inputs = torch.stack([columns * 10, columns.flip(0)])
    weights = np.exp([-1.0, 1.0]) / np.exp([-1.0, 1.0]).sum()
    wanted = weights[0] * columns.numpy() * 10 + weights[1] * columns.flip(0).numpy()
    np.testing.assert_allclose(mean_salience(inputs, columns).numpy(), wanted, rtol=1e-6)


@torch.no_grad()
def test_factors_are_those_of_the_papers_equations() -> None:
    model, samples = samples_in_time()
    x = absmax(samples[:4])
    w = torch.cat([model.one.weight, model.two.weight]).abs().amax(0).double().numpy()
    eta = np.exp([-scipy.stats.spearmanr(row, w).statistic for row in x])
    average = x[0]
    for row in x[1:]:
        average = 0.9 * average + 0.1 * row
    wanted = {
        "salience": normalised(np.sqrt((eta / eta.sum()) @ x / w)),
        "momentum": normalised(average**0.4 / w**0.6),
    }
    for name, method in {"salience": SalienceBalance(), "momentum": MomentumBalance(alpha=0.4, momentum=0.9)}.items():
        graph = transform(capture(model, samples[0]), samples[:4], [method], E2M1, progress=False)
        found = graph.get_buffer("one.smooth_scale")
        torch.testing.assert_close(
            found, wanted[name], rtol=2**-7, atol=0
        )  # a factor may lie between two of bfloat16's
        assert float((found == wanted[name]).float().mean()) > 0.9
        assert relative(graph(**samples[4]), model(**samples[4])) < 2e-6
        fresh = capture(model, samples[0])
        type(method).from_record(method.to_record()).apply(fresh)
        assert torch.equal(fresh(**samples[4]), model(**samples[4]))
        assert type(method.from_record(method.to_record())) is type(method)


@torch.no_grad()
def test_outlier_channels_are_divided_by_the_root_of_their_excess() -> None:
    model, samples = samples_in_time()
    ranges = absmax(samples[:4]).max(0)
    outliers = [3, 11, 20, 21, 22, 23]
    assert channel_bound(torch.tensor(ranges)) == pytest.approx(np.delete(ranges, outliers).max())
    graph = transform(capture(model, samples[0]), samples[:4], [OutlierScaling()], E2M1, progress=False)
    wanted = np.ones(128)
    wanted[outliers] = np.sqrt(np.delete(ranges, outliers).max() / ranges[outliers])
    found = graph.get_buffer("one.smooth_scale")
    torch.testing.assert_close(found.double(), torch.tensor(wanted), rtol=2**-8, atol=0)
    assert relative(graph(**samples[4]), model(**samples[4])) < 2e-6


def test_where_a_channel_stands_out() -> None:
    ordinary = torch.linspace(1, 2, 21)
    assert channel_bound(ordinary) == 2, "none does"
    assert channel_bound(torch.cat([ordinary, torch.tensor([50.0])])) == 2, "one alone"
    assert channel_bound(torch.cat([ordinary, torch.tensor([4.0, 4.2, 90.0])])) == pytest.approx(4.2), "above the gap"


@pytest.mark.parametrize("recipe", ["w4a6_e2m1", "int_w4a6", "w4a6_codebook", "nvfp4", "w4a6_static"])
@torch.no_grad()
def test_outliers_of_inputs_err_less(recipe: str) -> None:
    """On a timestep of its own noise; nothing errs less on the data it was fitted to than the whole grid of smoothquant."""
    model, samples = samples_in_time()
    config = replace(RECIPES[recipe](), skip=())
    expected, errors = model(**samples[4]), {}
    for name, transforms in {
        "none": [],
        "salience": [SalienceBalance()],
        "momentum": [MomentumBalance(alpha=0.5)],
        "outliers": [OutlierScaling()],
    }.items():
        graph = transform(capture(model, samples[0]), samples[:4], transforms, config, progress=False)
        errors[name] = relative(quantized(graph, config, samples[4])(**samples[4]), expected)
    assert errors["salience"] < (1 if recipe == "w4a6_codebook" else 0.95) * errors["none"]
    assert errors["momentum"] <= errors["none"]
    assert errors["outliers"] < (1 if recipe == "w4a6_codebook" else 0.95) * errors["none"]


@torch.no_grad()
def test_what_gains_nothing_is_left_alone() -> None:
    torch.manual_seed(0)
    model, sample = Layer().eval(), {"x": torch.randn(2, 48, 128).sign() * 2}  # every level exact
    for method in (SalienceBalance(), MomentumBalance(), OutlierScaling()):
        graph = transform(capture(model, sample), [sample], [method], E2M1, progress=False)
        assert method.groups == []
        assert "mul" not in show(graph)


def test_refusals() -> None:
    for wrong in ({"alpha": 1.5}, {"momentum": 1.0}, {"alpha": -1.0}):
        with pytest.raises(ValueError, match=r"MomentumBalance: alpha=.* from 0 to 1, the other less than 1"):
            MomentumBalance(**wrong)
    model, samples = samples_in_time()
    graph = transform(capture(model, samples[0]), samples, [SmoothQuant(points=4)], E2M1, progress=False)
    with pytest.raises(ValueError, match=r"smoothed already: it has one\.smooth_scale; apply salience_balance once"):
        transform(graph, samples, ["salience_balance"], E2M1, progress=False)
