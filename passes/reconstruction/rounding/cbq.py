"""CBQ's low-rank rounding (arXiv 2312.07950): AdaRound whose gates of a weight change together, by a matrix of low rank.

    w^ = S (low + (up - low) h),    h = clip(1.2 sigmoid(V0 + A1 A2) - 0.1, 0, 1),    up where V0 + A1 A2 >= 0,

with the regularizer of AdaRound, ``sum(1 - |2 h - 1|^beta)``. The paper writes V = A1 A2, which could not start where
``w^ = w``: V0 are AdaRound's own first logits here, fixed, and A2 is zero at first. A1 is random, of variance 1 / rank, so
that the product's elements move at the learning rate. ``rank (out_features + in_features)`` parameters learn, rather than
one a weight: a fraction of the optimizer's memory. Gates cannot all close one by one; what is half open at the end, the
threshold decides.

The paper rounds windows of two blocks: ``scope="window"``. Its truncation of outliers in weights is the scale search
``outlier_cut``; it also adds a divergence of softmaxes to the error, which says nothing about the hidden states of a
diffusion transformer, and is left out.
"""

import torch
from torch import Tensor, nn

from fp4dit_ao.observers import Grid
from fp4dit_ao.passes.reconstruction.rounding.adaround import AdaRound

RANK = 5
"""Of a weight's learned logits: recalled from the paper, not checked."""


class LowRankAdaRound(AdaRound):
    """One weight's gates.

    Attributes:
        left: float32 ``(out_features, rank)``, A1.
        right: float32 ``(rank, in_features)``, A2; zero at first.
        first: float32, V0, shaped like the weight; not learned.
    """

    alpha: Tensor  # type: ignore[assignment]

    def __init__(self, weight: Tensor, grid: Grid):
        super().__init__(weight, grid)
        first = self.alpha.detach()
        del self.alpha
        self.register_buffer("alpha", first, persistent=False)
        rows, columns = first.shape
        rank = max(1, min(RANK, rows, columns))
        start = torch.randn(rows, rank, generator=torch.Generator().manual_seed(0)) / rank**0.5
        self.left = nn.Parameter(start.to(first))
        self.right = nn.Parameter(first.new_zeros(rank, columns))

    def variable(self) -> Tensor:
        return torch.addmm(self.alpha, self.left, self.right)
