"""CBQ's truncation of outliers in weights (arXiv 2312.07950, its coarse-to-fine pre-processing), as a bound on scales.

Coarse: magnitudes above ``Q3 + 1.5 (Q3 - Q1)`` of all the weight's are candidates. Fine: in ascending order they are cut in two
where the variance of the lower set less the squared gap between the sets is smallest. What lies above the cut is truncated
to the largest magnitude below: in blocks with such weights the largest level stands for that, and rounding saturates.

The criterion is from notes on the paper, whose text was not at hand. The paper also divides channels of activations that have
outliers: transform ``outlier_scaling``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fp4dit_ao.formats import NumberFormat
from fp4dit_ao.ops import choose_scale

REACH = 1.5
"""Interquartile ranges above the third quartile that ordinary weights reach."""


def outlier_cut(weight: Tensor, block_size: Sequence[int], fmt: NumberFormat, scale_dtype: torch.dtype) -> Tensor:
    """The scale of absmax of every block, outliers of the whole weight truncated."""
    bound = threshold(weight)
    return choose_scale(weight.float().clamp(-bound, bound), block_size, str(fmt), scale_dtype)


def threshold(weight: Tensor) -> float:
    """The largest magnitude that is kept; the largest of all where fewer than two are candidates."""
    magnitudes = weight.detach().flatten().abs().double().sort().values
    candidates = magnitudes[magnitudes > coarse_bound(magnitudes)]
    if len(candidates) < 2:
        return float(magnitudes[-1])
    count = torch.arange(1, len(candidates), dtype=torch.float64, device=candidates.device)
    shifted = candidates - candidates[0]  # so that the difference of squares below keeps its digits
    mean = shifted[:-1].cumsum(0) / count
    variance = shifted[:-1].square().cumsum(0) / count - mean.square()
    return float(candidates[int((variance - candidates.diff().square()).argmin())])


def coarse_bound(ascending: Tensor) -> Tensor:
    """``Q3 + 1.5 (Q3 - Q1)`` of magnitudes in ascending order, above which they may be outliers."""
    first, third = (ascending[(len(ascending) - 1) * quarter // 4] for quarter in (1, 3))
    return third + REACH * (third - first)
