"""How a weight scale is found. Each function takes weights, a block size and a format and gives float32 scales."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fp4dit_ao.formats import FloatFormat
from fp4dit_ao.ops import choose_scale, dequantize, quantize

CLIPS = torch.linspace(0.4, 1.2, 81).tolist()
"""Fractions of absmax that the search tries; more than 1 lets the second-largest levels carry more of the group."""


def absmax(weight: Tensor, block_size: Sequence[int], fmt: FloatFormat, scale_dtype: torch.dtype) -> Tensor:
    """The largest magnitude on the largest level (the paper's choice)."""
    return choose_scale(weight, block_size, str(fmt), scale_dtype)


def mse(weight: Tensor, block_size: Sequence[int], fmt: FloatFormat, scale_dtype: torch.dtype) -> Tensor:
    """Per block, the scale among :data:`CLIPS` of absmax whose rounding has the least squared error.

    Source: the clip search of arXiv 2408.06995 (LBFP), with its 0.1 to 1.2 grid narrowed to where minima occur.
    """
    base = choose_scale(weight, block_size, str(fmt), torch.float32)
    best = base.to(scale_dtype)
    least = torch.full_like(base, torch.inf)
    for clip in CLIPS:
        scale = (base * clip).to(scale_dtype)
        rounded = dequantize(quantize(weight, block_size, scale, str(fmt)), block_size, scale, str(fmt), torch.float32)
        error = _sum_blocks((rounded - weight.float()).square(), base.shape)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def _sum_blocks(x: Tensor, blocks: Sequence[int]) -> Tensor:
    """Sum ``x`` over equal blocks: the result has shape ``blocks``."""
    shape = [part for size, count in zip(x.shape, blocks, strict=True) for part in (count, size // count)]
    return x.reshape(shape).sum(dim=list(range(1, 2 * len(blocks), 2)))


SEARCHES: dict[str, Callable[[Tensor, Sequence[int], FloatFormat, torch.dtype], Tensor]] = {
    "absmax": absmax,
    "mse": mse,
}
"""By the name that ``QuantConfig.weight_search`` uses."""
