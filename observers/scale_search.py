"""How a weight scale is found: functions of a weight, a block size, a format and the type in which to store the scales."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fp4dit_ao.formats import NumberFormat
from fp4dit_ao.kernels.cpu import candidate_search
from fp4dit_ao.ops import choose_scale, fake_quantize, to_scale_dtype

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
    candidates = [to_scale_dtype(base * clip, scale_dtype) for clip in (1.0, *CLIPS)]
    if candidate_search.supports(weight, block_size, fmt):
        scales = torch.stack(candidates)
        return scales.gather(0, candidate_search.best_candidate(weight, scales, fmt)[None]).squeeze(0)
    best, *others = candidates
    least = squared_error(weight, block_size, fmt, best)
    for scale in others:
        error = squared_error(weight, block_size, fmt, scale)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def squared_error(weight: Tensor, block_size: Sequence[int], fmt: NumberFormat, scale: Tensor) -> Tensor:
    """Of rounding to nearest, summed over each block: float32, shaped like ``scale``."""
    rounded = fake_quantize(weight, block_size, scale, str(fmt), torch.float32)
    return _sum_blocks((rounded - weight.float()).square(), scale.shape)


def _sum_blocks(x: Tensor, blocks: Sequence[int]) -> Tensor:
    """Sum ``x`` over equal blocks: the result has shape ``blocks``."""
    shape = [part for size, count in zip(x.shape, blocks, strict=True) for part in (count, size // count)]
    return x.reshape(shape).sum(dim=list(range(1, 2 * len(blocks), 2)))


SEARCHES: dict[str, Callable[[Tensor, Sequence[int], NumberFormat, torch.dtype], Tensor]] = {
    "absmax": absmax,
    "mse": mse,
}
"""By the name that ``QuantConfig.weight_search`` uses."""
