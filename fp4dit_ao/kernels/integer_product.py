"""The exact product of two int8 matrices on PyTorch's operators, of any sizes on any device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4dit_ao import _compat

_MULTIPLE, _LEAST_ROWS = 8, 17
"""Of ``torch._int_mm`` on CUDA: output and input features in eights, more than 16 rows."""


def integer_product(tokens: Tensor, levels: Tensor) -> Tensor:
    """int32 ``tokens @ levels^T``; zeros are added where CUDA asks for larger matrices.

    Args:
        tokens: int8 ``(rows, in_features)``.
        levels: int8 ``(out_features, in_features)``.

    Returns:
        int32 ``(rows, out_features)``; sums wrap around beyond int32.
    """
    (rows, depth), features = tokens.shape, levels.shape[0]
    known = isinstance(rows, int)  # a comparison would tie a traced graph to sizes
    if not features or (known and not rows):
        return tokens.new_zeros((rows, features), dtype=torch.int32)
    if not tokens.is_cuda:
        return _compat.int8_product(tokens.contiguous(), levels.contiguous().T)
    missing = max(0, _LEAST_ROWS - rows) if known else _LEAST_ROWS
    wide, tall = -depth % _MULTIPLE, -features % _MULTIPLE
    if wide or missing:
        tokens = F.pad(tokens, (0, wide, 0, missing))
    if wide or tall:
        levels = F.pad(levels, (0, wide, 0, tall))
    product = _compat.int8_product(tokens.contiguous(), levels.contiguous().T)
    return product.narrow(0, 0, rows).narrow(1, 0, features)
