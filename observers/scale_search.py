"""How a weight scale is found: functions of a weight, a block size, a format and the type in which to store the scales."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fp4dit_ao.formats import NumberFormat
from fp4dit_ao.kernels.candidate_search import best_candidate, squared_error
from fp4dit_ao.ops import choose_scale, to_scale_dtype

CLIPS = torch.linspace(0.4, 1.2, 81).tolist()
"""Fractions of absmax that the search tries; more than 1 lets the second-largest levels carry more of the group."""


def absmax(weight: Tensor, block_size: Sequence[int], fmt: NumberFormat, scale_dtype: torch.dtype) -> Tensor:
    """The largest magnitude on the largest level (the paper's choice)."""
    return choose_scale(weight, block_size, str(fmt), scale_dtype)


def mse(weight: Tensor, block_size: Sequence[int], fmt: NumberFormat, scale_dtype: torch.dtype) -> Tensor:
    """Per block, the scale among :data:`CLIPS` of absmax whose rounding has the least squared error; of equals, absmax.

    Source: the clip search of arXiv 2408.06995 (LBFP), with its 0.1 to 1.2 grid narrowed to where minima occur.
    """
    base = choose_scale(weight, block_size, str(fmt), torch.float32)
    scales = torch.stack([to_scale_dtype(base * clip, scale_dtype) for clip in (1.0, *CLIPS)])
    return scales.gather(0, best_candidate(weight, block_size, scales, fmt)[None]).squeeze(0)


__all__ = ["CLIPS", "SEARCHES", "absmax", "mse", "squared_error"]

SEARCHES: dict[str, Callable[[Tensor, Sequence[int], NumberFormat, torch.dtype], Tensor]] = {
    "absmax": absmax,
    "mse": mse,
}
"""By the name that ``QuantConfig.weight_search`` uses."""
