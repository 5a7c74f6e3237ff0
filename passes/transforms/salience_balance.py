"""PTQ4DiT's balancing: smoothing factors from the timesteps where an input's large channels are not the weight's."""

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fp4dit_ao.passes.transforms.input_statistics import InputStatistics
from fp4dit_ao.passes.transforms.smoothquant import SmoothQuant, balancing_scale


class SalienceBalance(SmoothQuant):
    """:class:`SmoothQuant` with the factors ``t_j = sqrt(s_X,j / s_W,j)``, and the salience of inputs averaged over timesteps.

    Source: PTQ4DiT (arXiv 2405.16005). The salience of a channel is its largest magnitude, ``s_W`` that of the weight's column.
    That of the input is ``s_X = sum_t eta_t s_X^(t)``, with ``eta = softmax(-rho_t)`` and ``rho_t`` Spearman's correlation of
    ``s_X^(t)`` and ``s_W``: timesteps at which inputs are large where weights are small, and balancing gains most, count more.

    Each calibration sample is one call at one timestep, and has a weight here. (The paper averages over timesteps; its code
    over the rows of the first calibration batch.) The paper folds factors into the modulation before a linear, which works
    where that is the block's own; here the graph multiplies, or ``fold=True`` folds as ``smoothquant`` does. Its code leaves
    the second linear of the feed-forward out; here every linear takes the factors if its output errs less with them in the
    quantizer's own formats, as with ``smoothquant``.

    Args: as of :class:`SmoothQuant`; ``points`` has no part in it.
    """

    name: ClassVar[str] = "salience_balance"

    def candidates(self, seen: Sequence[InputStatistics], columns: Tensor) -> Iterator[Tensor]:
        yield torch.ones_like(columns)
        inputs = torch.stack([torch.stack(statistics.by_sample) for statistics in seen]).amax(0)
        yield balancing_scale(mean_salience(inputs, columns), columns, 0.5, 0.5)


def mean_salience(inputs: Tensor, columns: Tensor) -> Tensor:
    """``s_X``, float32 ``(channels,)``.

    Args:
        inputs: ``s_X^(t)``, float32 ``(timesteps, channels)``.
        columns: ``s_W``, float32 ``(channels,)``.
    """
    weights = torch.softmax(-torch.stack([rank_correlation(row, columns) for row in inputs]), 0)
    return (weights[:, None] * inputs).sum(0)


def rank_correlation(x: Tensor, y: Tensor) -> Tensor:
    """Spearman's correlation of two vectors: that of the ranks of their entries. Of equal entries, the first ranks lower."""
    a, b = (v.argsort(stable=True).argsort(stable=True).float() for v in (x, y))
    a, b = a - a.mean(), b - b.mean()
    return (a * b).sum() / (a.square().sum() * b.square().sum()).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
