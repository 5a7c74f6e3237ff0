"""Sums with a low-bit weight, which are plain float tensors: for code that computes with a weight's values, such as DoRA."""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fp4dit_ao._compat import Arguments, Keywords, Operator


@runtime_checkable
class _LowBit(Protocol):
    """A low-bit weight, as far as a sum needs it."""

    @property
    def dtype(self) -> torch.dtype: ...

    def stored_linear(self, x: Tensor, bias: Tensor | None) -> Tensor: ...

    def dequantize(self, output_dtype: torch.dtype) -> Tensor: ...


def add(func: Operator, types: object, args: Arguments, kwargs: Keywords) -> Tensor:
    """``weight + x`` and ``x + weight``: the weight's values in the type that it presents itself as, and ``x``, added."""
    total: Tensor = func(*(x.dequantize(x.dtype) if isinstance(x, _LowBit) else x for x in args), **kwargs)
    return total
