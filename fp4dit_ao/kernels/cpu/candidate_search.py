"""Which of many candidate scales rounds a group of weights with the least squared error: one compiled loop on CPUs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fp4dit_ao.formats import NumberFormat
from fp4dit_ao.kernels.cpu import native


def supports(weight: Tensor, block_size: Sequence[int], fmt: NumberFormat) -> bool:
    """Whether :func:`best_candidate` can take it: on the CPU, at most sixteen levels, groups along the inputs."""
    grouped = weight.ndim == 2 and block_size[0] == 1
    return grouped and weight.device.type == "cpu" and fmt.bits <= 4 and native.shared_object() is not None


def best_candidate(weight: Tensor, scales: Tensor, fmt: NumberFormat) -> Tensor:
    """Index of the scale with the least squared error of rounding to nearest; of equals, the first.

    Args:
        weight: float ``(out_features, in_features)``.
        scales: ``(candidates, out_features, groups)``.
        fmt: of at most 4 bits.

    Returns:
        int64 ``(out_features, groups)``.
    """
    opened = native.shared_object()
    assert opened is not None
    weight, wide = weight.detach().float().contiguous(), scales.float().contiguous()
    levels, best = fmt.lattice.float(), torch.empty(scales.shape[1:], dtype=torch.int32)
    opened.fp4dit_search(
        weight.data_ptr(), wide.data_ptr(), levels.data_ptr(), best.data_ptr(), best.numel(),
        weight.numel() // max(1, best.numel()), scales.shape[0], len(levels), native.parallel(), torch.get_num_threads(),
    )  # fmt: skip
    return best.long()
