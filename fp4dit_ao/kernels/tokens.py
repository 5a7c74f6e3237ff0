"""Token-wise quantization to int8 levels: plain operators, which Inductor fuses into what precedes them.

Linears that read the same value (q, k and v; every block's text) share one quantization when they are compiled together.
"""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fp4dit_ao import _compat
from fp4dit_ao.formats import FloatFormat
from fp4dit_ao.ops import LIBRARY, choose_scale

_TRACED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""For every value in a graph being traced, by format: (its version, the result). Gone when the value is."""


def quantize_tokens(x: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    """Levels and scale of every token, rounded to nearest even.

    Args:
        x: float ``(..., features)``.
        fmt: a format whose levels are int8.

    Returns:
        int8 ``(tokens, features)`` and float32 ``(tokens, 1)``.
    """
    levels, scale = torch.ops.fp4dit_ao.quantize_tokens(x, fmt)
    return levels, scale


def _shared(x: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    if not _compat.is_traced(x):  # a tensor with memory of its own can change without a trace
        return _quantize(x, fmt)
    known = _TRACED.setdefault(x, {})
    version, result = known.get(fmt, (None, None))
    if result is None or version != x._version:
        result = _quantize(x, fmt)
        known[fmt] = (x._version, result)
    return result


def _quantize(x: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    tokens = x.reshape(-1, x.shape[-1])
    scale = choose_scale(tokens, [1, -1], fmt, torch.float32)
    return FloatFormat.parse(fmt).round(tokens.float() / scale).to(torch.int8), scale


LIBRARY.define("quantize_tokens(Tensor x, str fmt) -> (Tensor, Tensor)")
LIBRARY.impl("quantize_tokens", _shared, "CompositeImplicitAutograd")
