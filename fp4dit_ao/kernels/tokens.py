"""Token-wise quantization to int8 levels: plain operators, which Inductor fuses into what precedes them.

Levels too large for an int8 are written with several int8 digits, the way 1984 is 15 * 128 + 64: a product with the levels
is then the sum of the products with each digit, as exact as one. E3M4 takes two digits, E4M3 three.

Linears that read the same value (q, k and v; every block's text) share one quantization when they are compiled together.
"""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fp4dit_ao import _compat
from fp4dit_ao.formats import NumberFormat, parse
from fp4dit_ao.ops import LIBRARY, choose_scale

_BASE = 128
"""Of the digits: -127 to 127, with the sign of the level."""

_TRACED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""For every value in a graph being traced, by format: (its version, the result). Gone when the value is."""


def quantize_tokens(x: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    """Levels and scale of every token, rounded to nearest even.

    Args:
        x: float ``(..., features)``.
        fmt: a format whose levels take n int8 :func:`digits`.

    Returns:
        int8 ``(n * tokens, features)``, the highest digit of all tokens first, and float32 ``(n * tokens, 1)``, the tokens'
        scales times what a digit counts: the sum over n of their products is the tokens'.
    """
    levels, scale = torch.ops.fp4dit_ao.quantize_tokens(x, fmt)
    return levels, scale


def digits(fmt: NumberFormat) -> int:
    """How many int8 digits a level takes; 1 where every level is an int8."""
    count = 1
    while fmt.lattice_max >= _BASE**count:
        count += 1
    return count


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
    levels = parse(fmt).round(tokens.float() / scale)
    count = digits(parse(fmt))
    if count == 1:
        return levels.to(torch.int8), scale
    split = []
    for place in (float(_BASE**power) for power in reversed(range(count))):
        digit = torch.trunc(levels / place)
        split.append((digit.to(torch.int8), scale * place))
        levels = levels - digit * place
    return torch.cat([digit for digit, _ in split]), torch.cat([scale for _, scale in split])


LIBRARY.define("quantize_tokens(Tensor x, str fmt) -> (Tensor, Tensor)")
LIBRARY.impl("quantize_tokens", _shared, "CompositeImplicitAutograd")
