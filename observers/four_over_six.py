"""Four over six (arXiv 2512.02010): the largest magnitude of a block of E2M1 on 6, the largest value, or on 4.

Between 4 and 6 E2M1 has no value. A block whose scale is half as large again has its maximum on 4 instead, and its other large
elements on a finer grid. Each block takes the one that errs less. The scale of the tensor leaves room for the larger block
scales: the largest magnitude gets the block scale 256 rather than 448, E4M3's largest, since ``1.5 * 256 = 384`` still fits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fp4dit_ao.formats import FloatFormat, NumberFormat
from fp4dit_ao.kernels.candidate_search import best_candidate
from fp4dit_ao.ops import choose_scale, to_scale_dtype
from fp4dit_ao.ops.block_scale import RATIO, TOP, two_level_scale

FORMAT = "e2m1"
"""The only format with this gap."""


def four_over_six(weight: Tensor, block_size: Sequence[int], fmt: NumberFormat, scale_dtype: torch.dtype) -> Tensor:
    """Per block, ``absmax / 6`` or ``absmax / 4`` (in units of E2M1's values), by the squared error; of equals, the first.

    Raises:
        ValueError: another format than E2M1.
    """
    if str(fmt) != FORMAT:
        raise ValueError(f"weight_search='four_over_six' with format {fmt}; only {FORMAT} has nothing between 4 and 6")
    base = choose_scale(weight, block_size, str(fmt), torch.float32)
    return _better(weight, block_size, fmt, torch.stack([to_scale_dtype(base * x, scale_dtype) for x in (1.0, RATIO)]))


def four_over_six_scales(weight: Tensor, block_size: Sequence[int], fmt: str) -> tuple[Tensor, Tensor]:
    """The two scales of NVFP4, as :func:`~fp4dit_ao.ops.block_scale.two_level_scale` gives them.

    Args:
        weight: float ``(out_features, in_features)``.
        block_size: the blocks that share an E4M3 scale.
        fmt: of the elements, E2M1.
    """
    candidates = [two_level_scale(weight, block_size, fmt, TOP, stretch=x) for x in (1.0, RATIO)]
    tensor = candidates[0][1]
    blocks = torch.stack([scales for scales, _ in candidates])
    return _better(weight, block_size, FloatFormat.parse(fmt), blocks, tensor), tensor


def _better(
    weight: Tensor, block_size: Sequence[int], fmt: NumberFormat, scales: Tensor, unit: Tensor | float = 1.0
) -> Tensor:
    """Of the scales ``(candidates, *blocks)``, times ``unit``, those with the least squared error."""
    return scales.gather(0, best_candidate(weight, block_size, scales * unit, fmt)[None]).squeeze(0)
