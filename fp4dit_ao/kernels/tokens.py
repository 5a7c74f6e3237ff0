"""Token-wise quantization to int8 levels: plain operators, which Inductor fuses into what precedes them; on CPUs, one compiled
loop for what is large, and where nothing is traced.

Inductor makes two passes over the tensor, and divides; the loop has some rows in the first-level cache while it goes over them
twice, and multiplies. So it is several times quicker (``python -m benchmarks.tokens``), which is more than fusion saves. It
takes any layout, such as attention's heads, and one operator compiles sooner than the arithmetic that it stands for.

Levels too large for an int8 are written with several int8 digits, the way 1984 is 15 * 128 + 64: a product with the levels
is then the sum of the products with each digit, as exact as one. E3M4 takes two digits, E4M3 three.

Linears that read the same value (q, k and v; every block's text) share one quantization when they are compiled together.
"""

import functools
import math

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fp4dit_ao import _compat
from fp4dit_ao.formats import FloatFormat, NumberFormat, parse
from fp4dit_ao.kernels import native
from fp4dit_ao.ops import LIBRARY, choose_scale

_BASE = 128
"""Of the digits: -127 to 127, with the sign of the level."""

_MANY = 2**16
"""Numbers from which the compiled loop beats Inductor's: fewer take less time than entering an operator."""
_MOST_DIGITS = 3
"""Of the compiled loop: E4M3 takes as many."""

_TRACED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""For every value in a graph being traced, by format: (its version, the result). Gone when the value is."""


def quantize_tokens(x: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    """Levels and scale of every token, rounded to nearest even.

    Args:
        x: float ``(..., features)``.
        fmt: a format whose levels take n int8 :func:`digits`.

    Returns:
        int8 ``(n * tokens, features)``, the highest digit of all tokens first, and float32 ``(tokens, 1)``. Of products with
        each digit, :func:`add_digits` makes the tokens'.
    """
    levels, scale = torch.ops.fp4dit_ao.quantize_tokens(x, fmt)
    return levels, scale


def digits(fmt: NumberFormat) -> int:
    """How many int8 digits a level takes; 1 where every level is an int8."""
    count = 1
    while fmt.lattice_max >= _BASE**count:
        count += 1
    return count


def add_digits(y: Tensor, count: int) -> Tensor:
    """``(count * tokens, n)``, linear in the digits of tokens' levels, to ``(tokens, n)`` of the levels."""
    total, *lower = y.unflatten(0, (count, -1)).unbind()
    for digit in lower:
        total = total * _BASE + digit
    return total


def _shared(x: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    if not _compat.is_traced(x):  # a tensor with memory of its own can change without a trace
        return _run(x, fmt) if runs_natively(x, fmt) and not torch.compiler.is_compiling() else _quantize(x, fmt)
    known = _TRACED.setdefault(x, {})
    version, result = known.get(fmt, (None, None))
    if result is None or version != x._version:
        worthwhile = runs_natively(x, fmt) and _is_large(x)
        result = torch.ops.fp4dit_ao.int8_tokens(x, fmt) if worthwhile else _quantize(x, fmt)
        known[fmt] = (x._version, result)
    return result


def runs_natively(x: Tensor, fmt: str) -> bool:
    """Whether the compiled loop quantizes ``x``, as the operators do."""
    number = parse(fmt)
    simple = isinstance(number, FloatFormat) and number.mantissa_bits > 0 and digits(number) <= _MOST_DIGITS
    plain = _compat.is_traced(x) or type(x) in (Tensor, torch.nn.Parameter)
    return (
        simple and plain and x.device.type == "cpu" and x.dtype in native.OUTPUTS and native.shared_object() is not None
    )


def _is_large(x: Tensor) -> bool:
    """Whether the loop is quicker than what Inductor makes, as far as the size is known while a graph is made."""
    elements = _compat.size_hint(x.numel())
    return elements is None or elements >= _MANY


def _run(x: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    """What :func:`_quantize` gives, to the bit."""
    opened = native.shared_object()
    if opened is None:
        return _quantize(x, fmt)
    x = x.detach()
    if x.ndim > 4 or x.stride(-1) != 1:
        x = _rows(x).contiguous()
    sizes, strides = [1, 1, 1, *x.shape][-4:], [0, 0, 0, *x.stride()][-4:-1]
    mantissa_bits, count, largest = numbers(fmt)
    rows = math.prod(sizes[:3])
    levels = torch.empty((count * rows, sizes[3]), dtype=torch.int8)
    scale = torch.empty((rows, 1), dtype=torch.float32)
    opened.fp4dit_tokens(
        x.data_ptr(), levels.data_ptr(), scale.data_ptr(), *sizes, *strides, native.OUTPUTS[x.dtype],
        mantissa_bits, count, largest, native.parallel(), torch.get_num_threads(),
    )  # fmt: skip
    return levels, scale


@functools.cache
def numbers(fmt: str) -> tuple[int, int, float]:
    """Mantissa bits, digits of a level, and the largest level."""
    number = parse(fmt)
    assert isinstance(number, FloatFormat)
    return number.mantissa_bits, digits(number), float(number.lattice_max)


def _quantize(x: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    scale = choose_scale(x, [1] * (x.ndim - 1) + [-1], fmt, torch.float32)
    levels = parse(fmt).round(x.float() / scale)
    count = digits(parse(fmt))
    parts = []
    for place in (float(_BASE**power) for power in reversed(range(1, count))):
        digit = torch.trunc(levels / place)
        parts.append(_rows(digit.to(torch.int8)))
        levels = levels - digit * place
    parts.append(_rows(levels.to(torch.int8)))
    # integers first: what is written is in order, whatever the order of x
    return torch.cat(parts) if count > 1 else parts[0], _rows(scale)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _shapes(x: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    count = digits(parse(fmt))
    rows = math.prod(x.shape[:-1])
    return x.new_empty((count * rows, x.shape[-1]), dtype=torch.int8), x.new_empty((rows, 1), dtype=torch.float32)


LIBRARY.define("quantize_tokens(Tensor x, str fmt) -> (Tensor, Tensor)")
LIBRARY.impl("quantize_tokens", _shared, "CompositeImplicitAutograd")
LIBRARY.define("int8_tokens(Tensor x, str fmt) -> (Tensor, Tensor)")
LIBRARY.impl("int8_tokens", _run, "CPU")
LIBRARY.impl("int8_tokens", _quantize, "CUDA")
LIBRARY.impl("int8_tokens", _shapes, "Meta")
