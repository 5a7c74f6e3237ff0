"""ViDiT-Q's static balance: smoothing factors from a moving average of the ranges of inputs."""

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torchao.quantization.pt2e.quantizer import Quantizer

from fp4dit_ao.passes.transforms.input_statistics import InputStatistics
from fp4dit_ao.passes.transforms.smoothquant import SmoothQuant, balancing_scale


class MomentumBalance(SmoothQuant):
    """:class:`SmoothQuant` with one pair of exponents, and ranges of inputs that follow the samples by a moving average.

    ``t_j = m_j^alpha / max|W_j|^(1 - alpha)``, ``m <- momentum m + (1 - momentum) max|X_j|`` from sample to sample.

    Source: ViDiT-Q (arXiv 2406.02540), the static half of its static-dynamic channel balance, with alpha = 0.3 and momentum
    0.95, its code's values for PixArt. The other half, for what varies over time, is a Hadamard rotation:
    ``transforms=["momentum_balance", "hadamard"]``. (The code of August 2024 has no rotation; and a vector of factors for every
    range of timesteps, where there is one here.) Its ranges of tokens, found online, are what recipes do; its mixed
    precision is ``allocation="integer_programme"``.

    Every linear takes the factors if its output errs less with them in the quantizer's own formats, as with ``smoothquant``.

    Args:
        quantizer: says which linears are quantized, and with which observers.
        alpha: exponent of the input's range, from 0 to 1.
        momentum: what is kept of the average at each sample, from 0 to less than 1.
        rows: of each input, kept to measure output errors on.
        fold: whether factors are folded into other parameters where they can be.

    Raises:
        ValueError: an exponent or a momentum out of range, or fewer than one row.
    """

    name: ClassVar[str] = "momentum_balance"

    def __init__(
        self,
        quantizer: Quantizer | None = None,
        alpha: float = 0.3,
        momentum: float = 0.95,
        rows: int = 512,
        fold: bool = False,
    ):
        if not 0 <= alpha <= 1 or not 0 <= momentum < 1:
            raise ValueError(
                f"MomentumBalance: alpha={alpha} and momentum={momentum}; the one must be from 0 to 1, the other less than 1"
            )
        super().__init__(quantizer, 1, rows, fold)
        self.alpha, self.momentum = alpha, momentum

    def candidates(self, seen: Sequence[InputStatistics], columns: Tensor) -> Iterator[Tensor]:
        yield torch.ones_like(columns)
        first, *others = torch.stack([torch.stack(statistics.by_sample) for statistics in seen]).amax(0)
        average = first
        for ranges in others:
            average = self.momentum * average + (1 - self.momentum) * ranges
        yield balancing_scale(average, columns, self.alpha, 1 - self.alpha)
