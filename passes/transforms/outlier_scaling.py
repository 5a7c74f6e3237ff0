"""CBQ's pre-processing of inputs: channels with outliers, found coarse to fine, are divided by a factor of their own."""

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fp4dit_ao.observers.outlier_cut import coarse_bound, threshold
from fp4dit_ao.passes.transforms.input_statistics import InputStatistics
from fp4dit_ao.passes.transforms.smoothquant import SmoothQuant


class OutlierScaling(SmoothQuant):
    """:class:`SmoothQuant` with the factors ``t_j = sqrt(m_j / bound)`` for channels above a bound, and 1 for all others.

    Source: CBQ (arXiv 2312.07950), the half of its coarse-to-fine pre-processing that is about activations; scale search
    ``outlier_cut`` is the other. ``m_j`` is the largest magnitude of a channel. Coarse: channels above ``Q3 + 1.5 (Q3 - Q1)``
    are candidates. Fine: in ascending order they are cut in two where the variance of the lower set less the squared gap
    between the sets is smallest, and the lower set's largest is the bound. A candidate that is alone is above it: the bound
    then is the largest of the others. The criterion and the root are from notes on the paper, whose text was not at hand.

    Only channels with outliers change, so that weights elsewhere are what they were. Every linear takes the factors if its
    output errs less with them in the quantizer's own formats, as with ``smoothquant``; the paper always does.

    Args: as of :class:`SmoothQuant`; ``points`` has no part in it.
    """

    name: ClassVar[str] = "outlier_scaling"

    def candidates(self, seen: Sequence[InputStatistics], columns: Tensor) -> Iterator[Tensor]:
        yield torch.ones_like(columns)
        inputs = torch.stack([statistics.absmax for statistics in seen if statistics.absmax is not None]).amax(0)
        bound = channel_bound(inputs)
        if bool((inputs > bound).any()):
            yield (bound / inputs).clamp(max=1).sqrt().to(torch.bfloat16).float()


def channel_bound(ranges: Tensor) -> float:
    """The largest range of a channel without outliers.

    Args:
        ranges: largest magnitude of every channel, float ``(channels,)``.
    """
    ascending = ranges.double().sort().values
    ordinary = ascending[ascending <= coarse_bound(ascending)]
    return float(ordinary[-1]) if len(ordinary) == len(ascending) - 1 else threshold(ranges)
