"""``LowBitWeight``: any of this package's tensors for a linear's weight."""

from collections.abc import Callable

from torch import Tensor

from fp4dit_ao import _compat
from fp4dit_ao.tensors.block_scaled import MXWeight, NVFP4Weight
from fp4dit_ao.tensors.quantized_weight import QuantizedWeight

LowBitWeight = QuantizedWeight | MXWeight | NVFP4Weight
"""Weights that say which ``unit`` computes their linear."""


def store_parts(weight: Tensor, keep: Callable[[Tensor], Tensor]) -> None:
    """Replaces the plain tensors that a low-bit weight consists of by the copies that ``keep`` makes, in the same layout."""
    for part in _compat.parts(type(weight)):
        if isinstance(value := getattr(weight, part), Tensor):
            setattr(weight, part, keep(value))
