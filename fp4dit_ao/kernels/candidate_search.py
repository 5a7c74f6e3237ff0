"""Which of many candidate scales rounds a group of weights with the least squared error."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fp4dit_ao.formats import NumberFormat
from fp4dit_ao.kernels.cpu import native
from fp4dit_ao.kernels.units import Unit, UnitTable
from fp4dit_ao.ops import quantization


class SearchOperands(NamedTuple):
    """What decides how candidates are compared.

    Attributes:
        weight: format to round to.
        device: of the weight.
        grouped: whether groups lie along the input features of a matrix.
    """

    weight: NumberFormat
    device: torch.device
    grouped: bool


def _compiled(weight: Tensor, block_size: Sequence[int], scales: Tensor, fmt: NumberFormat) -> Tensor:
    opened = native.shared_object()
    assert opened is not None
    weight, wide = weight.detach().float().contiguous(), scales.float().contiguous()
    levels, best = fmt.lattice.float(), torch.empty(scales.shape[1:], dtype=torch.int32)
    opened.fp4dit_search(
        weight.data_ptr(), wide.data_ptr(), levels.data_ptr(), best.data_ptr(), best.numel(),
        weight.numel() // max(1, best.numel()), scales.shape[0], len(levels), native.parallel(), torch.get_num_threads(),
    )  # fmt: skip
    return best.long()


def _on_operators(weight: Tensor, block_size: Sequence[int], scales: Tensor, fmt: NumberFormat) -> Tensor:
    best = torch.zeros(scales.shape[1:], dtype=torch.int64, device=scales.device)
    least = squared_error(weight, block_size, fmt, scales[0])
    for index in range(1, len(scales)):
        error = squared_error(weight, block_size, fmt, scales[index])
        best = torch.where(error < least, index, best)
        least = torch.minimum(error, least)
    return best


CANDIDATE_SEARCH: UnitTable[SearchOperands] = UnitTable(
    "candidate_search",
    [
        Unit(
            "compiled loop",
            lambda o: o.grouped and o.device.type == "cpu" and o.weight.bits <= 4 and native.is_built(),
            _compiled,
        ),
        Unit("PyTorch operators", lambda o: True, _on_operators),
    ],
)


def best_candidate(weight: Tensor, block_size: Sequence[int], scales: Tensor, fmt: NumberFormat) -> Tensor:
    """Index of the scale with the least squared error of rounding to nearest; of equals, the first.

    Args:
        weight: float, usually ``(out_features, in_features)``.
        block_size: elements along each dimension that share a scale; -1 for all of them.
        scales: ``(candidates, *blocks)``, such as ``(candidates, out_features, groups)``.
        fmt: format to round to.

    Returns:
        int64 ``blocks``.
    """
    grouped = weight.ndim == 2 and block_size[0] == 1
    unit = CANDIDATE_SEARCH.pick(SearchOperands(fmt, weight.device, grouped))
    best: Tensor = unit.run(weight, block_size, scales, fmt)
    return best


def squared_error(weight: Tensor, block_size: Sequence[int], fmt: NumberFormat, scale: Tensor) -> Tensor:
    """Squared error of rounding to nearest, summed over each block: float32, shaped like ``scale``."""
    return quantization.squared_error(weight, block_size, scale, str(fmt))
