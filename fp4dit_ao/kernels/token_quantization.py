"""Token-wise quantization to int8 levels: PyTorch's operators, or one compiled loop on CPUs.

Inductor fuses the operators into what precedes them, but makes two passes over the tensor, and divides. The loop goes over a
few rows at a time twice while they are in the first-level cache, and multiplies, which makes it several times faster
(``python -m benchmarks.tokens``): more than fusion saves, except for small tensors. It takes any layout, such as attention's
heads, and compiles sooner, being one operator.

Levels too large for an int8 are written with several int8 digits, the way 1984 is 15 * 128 + 64: a product with the levels
is then the sum of the products with each digit, and as exact as one. E3M4 takes two digits, E4M3 three.

Linears that read the same value (q, k and v; every block's text) share one quantization when they are compiled together.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fp4dit_ao import _compat
from fp4dit_ao.formats import FloatFormat, NumberFormat, parse
from fp4dit_ao.formats.number_format import E4M3_STEP
from fp4dit_ao.kernels.cpu import native
from fp4dit_ao.kernels.units import Unit, UnitTable
from fp4dit_ao.ops import LIBRARY, choose_scale

MOST_DIGITS = 3
"""Most digits of a level that the int8 kernels take; E4M3 needs this many."""
_BASE = 128
"""Base of the digits, which are -127 to 127 and have the level's sign."""
_WORTHWHILE_ELEMENTS = 2**16
"""Elements from which the loop is faster than Inductor's code; below, entering an operator takes longer than the work."""

_TRACED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Results by value of the graph being traced, and by function and format: (the value's version, result). Gone with the
value."""


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


def fp8_tokens(x: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    """Levels and scale of every token for FP8 products, rounded to nearest even.

    Formats that E4M3 rounds as they do (``FloatFormat.is_rounded_by_e4m3``: E2M3, E4M3) take one conversion: levels are in
    units of E4M3's smallest number, and the scale is as much larger.

    Args:
        x: float ``(..., features)``.
        fmt: a format for which :func:`fits_fp8`.

    Returns:
        float8_e4m3fn ``(tokens, features)`` and float32 ``(tokens, 1)``; infinite where a token exceeds 4e37.
    """
    levels, scale = torch.ops.fp4dit_ao.fp8_tokens(x, fmt)
    return levels, scale


def fits_fp8(fmt: NumberFormat) -> bool:
    """Whether :func:`fp8_tokens` quantizes to the format."""
    return fmt.is_exact_in_e4m3 or (isinstance(fmt, FloatFormat) and fmt.is_rounded_by_e4m3)


def digits(fmt: NumberFormat) -> int:
    """Int8 digits that a level of the format takes; 1 where every level is an int8."""
    count = 1
    while fmt.lattice_max >= _BASE**count:
        count += 1
    return count


def add_digits(y: Tensor, count: int) -> Tensor:
    """Adds products with each digit, ``(count * tokens, n)``, the highest first, up to those with levels, ``(tokens, n)``."""
    total, *lower = y.unflatten(0, (count, -1)).unbind()
    for digit in lower:
        total = total * _BASE + digit
    return total


class TokenOperands(NamedTuple):
    """What decides how tokens are quantized.

    Attributes:
        fmt: format to quantize to.
        device: of the tokens.
        dtype: of the tokens.
        plain: whether they are an ordinary tensor, or stand for one in a traced graph.
    """

    fmt: NumberFormat
    device: torch.device
    dtype: torch.dtype
    plain: bool


def _loop_supports(o: TokenOperands) -> bool:
    simple = isinstance(o.fmt, FloatFormat) and o.fmt.mantissa_bits > 0 and digits(o.fmt) <= MOST_DIGITS
    readable = o.plain and o.device.type == "cpu" and o.dtype in native.OUTPUTS
    return simple and readable and native.is_built()


def _quantize_tokens(x: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    """``torch.ops.fp4dit_ao.quantize_tokens``: the picked unit; in a traced graph, once for each value and format."""
    if not _compat.is_traced(x):
        unit = TOKENS.units[-1] if torch.compiler.is_compiling() else TOKENS.pick(_operands(x, fmt))
        return unit.run(x, fmt)
    compiled = in_compiled_loop(x, fmt) and _is_large(x)
    return _once(torch.ops.fp4dit_ao.int8_tokens if compiled else operator_tokens, x, fmt)


def _fp8_tokens(x: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    """``torch.ops.fp4dit_ao.fp8_tokens``: in a traced graph, once for each value and format."""
    return _once(operator_fp8_tokens, x, fmt) if _compat.is_traced(x) else operator_fp8_tokens(x, fmt)


def _once(quantize: Callable[[Tensor, str], tuple[Tensor, Tensor]], x: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    """``quantize(x, fmt)`` in a traced graph, for all who ask for the same; not for tensors with memory of their own, which
    can change without a trace."""
    known = _TRACED.setdefault(x, {})
    key = quantize, fmt
    version, result = known.get(key, (None, None))
    if result is None or version != _compat.version(x):
        result = quantize(x, fmt)
        known[key] = (_compat.version(x), result)
    return result


def in_compiled_loop(x: Tensor, fmt: str) -> bool:
    """Whether the compiled loop quantizes ``x``, rather than PyTorch's operators."""
    return TOKENS.pick(_operands(x, fmt)).run is compiled_tokens


def _operands(x: Tensor, fmt: str) -> TokenOperands:
    plain = _compat.is_traced(x) or type(x) in (Tensor, torch.nn.Parameter)
    return TokenOperands(parse(fmt), x.device, x.dtype, plain)


def _is_large(x: Tensor) -> bool:
    """Whether the loop is faster than Inductor's code, as far as the size is known while a graph is made."""
    elements = _compat.size_hint(x.numel())
    return elements is None or elements >= _WORTHWHILE_ELEMENTS


@contextlib.contextmanager
def always_in_loop() -> Iterator[None]:
    """Graphs made in the meantime quantize tensors of any size in the compiled loop, for graphs that no compiler fuses."""
    global _WORTHWHILE_ELEMENTS
    before, _WORTHWHILE_ELEMENTS = _WORTHWHILE_ELEMENTS, 0
    try:
        yield
    finally:
        _WORTHWHILE_ELEMENTS = before


def compiled_tokens(x: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    """:func:`operator_tokens` by the compiled loop, to the bit; by the operators themselves where there is no library."""
    opened = native.shared_object()
    if opened is None:
        return operator_tokens(x, fmt)
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
    """Mantissa bits of a format, digits of its levels, and its largest level."""
    number = parse(fmt)
    assert isinstance(number, FloatFormat)
    return number.mantissa_bits, digits(number), float(number.lattice_max)


def operator_tokens(x: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    """Arguments and result as those of :func:`quantize_tokens`, on PyTorch's operators: the specification."""
    scale = choose_scale(x, [1] * (x.ndim - 1) + [-1], fmt, torch.float32)
    levels = parse(fmt).round(x.float() / scale)
    count = digits(parse(fmt))
    parts = []
    for place in (float(_BASE**power) for power in reversed(range(1, count))):
        digit = torch.trunc(levels / place)
        parts.append(_rows(digit.to(torch.int8)))
        levels = levels - digit * place
    parts.append(_rows(levels.to(torch.int8)))
    # converted to integers before the reshape, so that what is written is contiguous whatever the layout of x
    return torch.cat(parts) if count > 1 else parts[0], _rows(scale)


def operator_fp8_tokens(x: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    """Arguments and result as those of :func:`fp8_tokens`, on PyTorch's operators: the specification.

    Few operators, so that Inductor computes them in the same loop as what precedes them.
    """
    number = parse(fmt)
    scale = choose_scale(x, [1] * (x.ndim - 1) + [-1], fmt, torch.float32)
    y = x.float() / scale
    if isinstance(number, FloatFormat) and number.is_rounded_by_e4m3:
        largest = number.lattice_max * E4M3_STEP
        return _rows((y * E4M3_STEP).clamp(-largest, largest).to(torch.float8_e4m3fn)), _rows(scale / E4M3_STEP)
    return _rows(number.round(y).to(torch.float8_e4m3fn)), _rows(scale)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _empty_result(x: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    count = digits(parse(fmt))
    rows = math.prod(x.shape[:-1])
    return x.new_empty((count * rows, x.shape[-1]), dtype=torch.int8), x.new_empty((rows, 1), dtype=torch.float32)


TOKENS: UnitTable[TokenOperands] = UnitTable(
    "quantize_tokens",
    [
        Unit("compiled loop", _loop_supports, compiled_tokens),
        Unit("PyTorch operators", lambda o: True, operator_tokens),
    ],
)

LIBRARY.define("quantize_tokens(Tensor x, str fmt) -> (Tensor, Tensor)")
LIBRARY.impl("quantize_tokens", _quantize_tokens, "CompositeImplicitAutograd")
LIBRARY.define("fp8_tokens(Tensor x, str fmt) -> (Tensor, Tensor)")
LIBRARY.impl("fp8_tokens", _fp8_tokens, "CompositeImplicitAutograd")
LIBRARY.define("int8_tokens(Tensor x, str fmt) -> (Tensor, Tensor)")
LIBRARY.impl("int8_tokens", compiled_tokens, "CPU")
LIBRARY.impl("int8_tokens", operator_tokens, "CUDA")
LIBRARY.impl("int8_tokens", _empty_result, "Meta")
