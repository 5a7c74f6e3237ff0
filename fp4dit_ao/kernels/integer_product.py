"""The exact product of two int8 matrices on PyTorch's operators, of any sizes on any device."""

import functools
import operator

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4dit_ao import _compat

_MULTIPLE, _LEAST_ROWS = 8, 17
"""Of ``torch._int_mm`` on CUDA: output and input features in eights, more than 16 rows."""

_EXACT = 2**24 // 128**2
"""Products of int8 numbers whose sum float32 holds, in whatever order they are added."""


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
        if tokens.device.type == "cpu" and not _compat.cpu_multiplies_int8():
            return _in_floats(tokens, levels)
        return _compat.int8_product(tokens.contiguous(), levels.contiguous().T)
    missing = max(0, _LEAST_ROWS - rows) if known else _LEAST_ROWS
    wide, tall = -depth % _MULTIPLE, -features % _MULTIPLE
    if wide or missing:
        tokens = F.pad(tokens, (0, wide, 0, missing))
    if wide or tall:
        levels = F.pad(levels, (0, wide, 0, tall))
    product = _compat.int8_product(tokens.contiguous(), levels.contiguous().T)
    return product.narrow(0, 0, rows).narrow(1, 0, features)


def _in_floats(tokens: Tensor, levels: Tensor) -> Tensor:
    """The same product in float32, input features in parts of which no sum is rounded."""
    # under autocast a product of float32 has a bfloat16 result, and one of float64 stays as it is
    wide = torch.float64 if torch.is_autocast_enabled("cpu") else torch.float32
    parts = zip(tokens.split(_EXACT, 1), levels.split(_EXACT, 1), strict=True)
    return functools.reduce(operator.add, (F.linear(x.to(wide), y.to(wide)).to(torch.int32) for x, y in parts))
