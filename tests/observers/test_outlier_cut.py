"""CBQ's truncation of outliers: the cut by trying all of them in NumPy, scales, errors that fall."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torchao.quantization.granularity import PerAxis, PerGroup

from fp4dit_ao.formats import parse
from fp4dit_ao.observers import WeightObserver
from fp4dit_ao.observers.outlier_cut import outlier_cut, threshold


def weight(seed: int, outliers: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(32, 128, generator=generator)
    x.view(-1)[torch.randperm(x.numel(), generator=generator)[:outliers]] = torch.linspace(20, 24, outliers)
    return x


def by_trial(x: Tensor) -> float:
    a = np.sort(np.abs(x.double().numpy()).ravel())
    first, third = (np.quantile(a, q, method="lower") for q in (0.25, 0.75))
    candidates = a[a > third + 1.5 * (third - first)]
    if len(candidates) < 2:
        return a[-1]
    scores = [(candidates[:i].var() - (candidates[i] - candidates[i - 1]) ** 2) for i in range(1, len(candidates))]
    return candidates[int(np.argmin(scores))]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("outliers", [0, 1, 5])
def test_the_cut_is_the_best_of_all(seed: int, outliers: int) -> None:
    x = weight(seed, outliers)
    assert threshold(x) == pytest.approx(by_trial(x), rel=1e-9)
    if outliers:
        assert threshold(x) < 6, "what lies at 20 and above is an outlier"


def test_without_outliers_nothing_is_cut() -> None:
    x = torch.rand(8, 64, generator=torch.Generator().manual_seed(0))
    assert threshold(x) == float(x.max())
    assert torch.equal(
        outlier_cut(x, [1, 64], parse("e2m1"), torch.float32), (x.amax(1, keepdim=True).double() / 12).float()
    )
    assert threshold(torch.zeros(4, 4)) == 0


@pytest.mark.parametrize(
    ("fmt", "granularity"), [("e2m1", PerGroup(32)), ("int4", PerAxis(0)), ("nf4", PerGroup(128)), ("e2m1", PerAxis(0))]
)
def test_blocks_with_outliers_are_rounded_as_if_these_were_truncated(fmt: str, granularity: object) -> None:
    x = weight(0)
    bound = threshold(x)
    cut = WeightObserver(fmt, granularity, search="outlier_cut")
    found = cut.dequantized(x)
    assert torch.equal(found, WeightObserver(fmt, granularity).dequantized(x.clamp(-bound, bound)))
    ordinary = x.abs() <= bound
    errors = [(y - x)[ordinary].square().mean() for y in (found, WeightObserver(fmt, granularity).dequantized(x))]
    assert errors[0] < errors[1], "what is left has finer steps"
