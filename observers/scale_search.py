"""Scale searches: how the scale of every block of a weight is found. :data:`SEARCHES` has them by name."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fp4dit_ao.config.quant_config import WEIGHT_SEARCHES
from fp4dit_ao.formats import NumberFormat
from fp4dit_ao.kernels.cpu import candidate_search
from fp4dit_ao.ops import choose_scale, fake_quantize, to_scale_dtype
from fp4dit_ao.util.registry import Registry


class ScaleSearch(Protocol):
    """A function of a weight that gives the scale of every block.

    The weight observer calls it in its first forward, and once more for each further candidate format, with a detached weight
    that is never a fake tensor. It must be deterministic: a run that resumes, and the module form, which quantizes without a
    graph, must find the same scales.
    """

    def __call__(
        self, weight: Tensor, block_size: Sequence[int], fmt: NumberFormat, scale_dtype: torch.dtype, /
    ) -> Tensor:
        """Finds the scales.

        Args:
            weight: float ``(out_features, in_features)``, finite, of any float type and device; not to be changed.
            block_size: torchao's: how many rows and columns share a scale, -1 for all.
            fmt: format whose levels, times the scale, stand for the weight.
            scale_dtype: float type in which scales are stored. A search judges scales as they are after rounding to it.

        Returns:
            ``scale_dtype`` ``(out_features / block_size[0], in_features / block_size[1])`` on the weight's device; every scale
            positive and finite, of blocks of zeros, too (``ops.to_scale_dtype`` sees to that).
        """


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
    """Squared error of rounding to nearest, summed over each block: float32, shaped like ``scale``."""
    rounded = fake_quantize(weight, block_size, scale, str(fmt), torch.float32)
    return _sum_blocks((rounded - weight.float()).square(), scale.shape)


def _sum_blocks(x: Tensor, blocks: Sequence[int]) -> Tensor:
    """Sum ``x`` over equal blocks: the result has shape ``blocks``."""
    shape = [part for size, count in zip(x.shape, blocks, strict=True) for part in (count, size // count)]
    return x.reshape(shape).sum(dim=list(range(1, 2 * len(blocks), 2)))


SEARCHES: Registry[ScaleSearch] = Registry("scale search")
"""By the name that ``QuantConfig.weight_search`` and ``WeightObserver(search=...)`` take."""


def register_search(name: str, search: ScaleSearch, *, summary: str, source: str = "", cost: str = "") -> ScaleSearch:
    """Makes ``search`` known to observers and configs as ``name``, and returns it. See ``Registry.register``.

    Raises:
        ValueError: another search has this name.
    """
    SEARCHES.register(name, search, summary=summary, source=source, cost=cost)
    if name not in WEIGHT_SEARCHES:
        WEIGHT_SEARCHES.append(name)
    return search


register_search(
    "absmax",
    absmax,
    summary="The largest magnitude of a block on the largest level",
    source="arXiv 2503.15465, eq. 6-8",
)
register_search(
    "mse",
    mse,
    summary="Of 81 fractions of absmax the one with the least squared error",
    source="arXiv 2408.06995, section 3 (clip search)",
    cost="seconds a model",
)
