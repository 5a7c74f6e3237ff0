"""Token-wise quantization to int8 levels: plain operators, which Inductor fuses into what precedes them; on CPUs, one compiled
loop for what is large, and where nothing is traced.

Inductor makes two passes over the tensor, and divides; the loop has a row in the first-level cache while it goes over it twice,
and multiplies. So it is several times quicker (``python -m benchmarks.tokens``), which is more than fusion saves.

Levels too large for an int8 are written with several int8 digits, the way 1984 is 15 * 128 + 64: a product with the levels
is then the sum of the products with each digit, as exact as one. E3M4 takes two digits, E4M3 three.

Linears that read the same value (q, k and v; every block's text) share one quantization when they are compiled together.
"""

import functools

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fp4dit_ao import _compat
from fp4dit_ao.formats import FloatFormat, NumberFormat, parse
from fp4dit_ao.kernels import native
from fp4dit_ao.ops import LIBRARY, choose_scale

_BASE = 128
"""Of the digits: -127 to 127, with the sign of the level."""

_LONG_ROW, _MANY = 256, 2**16
"""Features, and numbers in all, from which the compiled loop beats Inductor's: shorter rows (attention heads) are quicker in
one kernel with what permutes them, and fewer numbers than it takes to enter an operator."""

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
        return _run(x, fmt) if _runs_natively(x, fmt) and not torch.compiler.is_compiling() else _quantize(x, fmt)
    known = _TRACED.setdefault(x, {})
    version, result = known.get(fmt, (None, None))
    if result is None or version != x._version:
        worthwhile = _runs_natively(x, fmt) and _is_large(x)
        result = torch.ops.fp4dit_ao.int8_tokens(_rows(x).contiguous(), fmt) if worthwhile else _quantize(x, fmt)
        known[fmt] = (x._version, result)
    return result


def _runs_natively(x: Tensor, fmt: str) -> bool:
    number = parse(fmt)
    simple = isinstance(number, FloatFormat) and number.mantissa_bits > 0 and number.fits_int8
    plain = _compat.is_traced(x) or type(x) in (Tensor, torch.nn.Parameter)
    return (
        simple and plain and x.device.type == "cpu" and x.dtype in native.OUTPUTS and native.shared_object() is not None
    )


def _is_large(x: Tensor) -> bool:
    """Whether the loop is quicker than what Inductor makes, as far as the sizes are known while a graph is made."""
    features, elements = _compat.size_hint(x.shape[-1]), _compat.size_hint(x.numel())
    return (features is None or features >= _LONG_ROW) and (elements is None or elements >= _MANY)


def _run(x: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    """What :func:`_quantize` gives, to the bit."""
    opened = native.shared_object()
    if opened is None:
        return _quantize(x, fmt)
    tokens = _rows(x.detach()).contiguous()
    rows, features = tokens.shape
    levels = torch.empty((rows, features), dtype=torch.int8)
    scale = torch.empty((rows, 1), dtype=torch.float32)
    opened.fp4dit_tokens(
        tokens.data_ptr(), levels.data_ptr(), scale.data_ptr(), rows, features, native.OUTPUTS[tokens.dtype],
        *_levels(fmt), native.parallel(), torch.get_num_threads(),
    )  # fmt: skip
    return levels, scale


@functools.cache
def _levels(fmt: str) -> tuple[int, float]:
    """Mantissa bits and the largest level."""
    number = parse(fmt)
    assert isinstance(number, FloatFormat)
    return number.mantissa_bits, float(number.lattice_max)


def _quantize(x: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    scale = choose_scale(x, [1] * (x.ndim - 1) + [-1], fmt, torch.float32)
    levels = parse(fmt).round(x.float() / scale)
    parts = []
    for place in (float(_BASE**power) for power in reversed(range(1, digits(parse(fmt))))):
        digit = torch.trunc(levels / place)
        parts.append((_rows(digit.to(torch.int8)), _rows(scale * place)))
        levels = levels - digit * place
    last = (
        _rows(levels.to(torch.int8)),
        _rows(scale),
    )  # integers first: what is written is in order, whatever the order of x
    if not parts:
        return last
    highest_first = [*parts, last]
    return torch.cat([digit for digit, _ in highest_first]), torch.cat([scale for _, scale in highest_first])


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


LIBRARY.define("quantize_tokens(Tensor x, str fmt) -> (Tensor, Tensor)")
LIBRARY.impl("quantize_tokens", _shared, "CompositeImplicitAutograd")
LIBRARY.define("int8_tokens(Tensor x, str fmt) -> (Tensor, Tensor)")
LIBRARY.impl("int8_tokens", _run, "CPU")
LIBRARY.impl("int8_tokens", _quantize, "CUDA")
LIBRARY.impl(
    "int8_tokens",
    lambda x, fmt: (x.new_empty(x.shape, dtype=torch.int8), x.new_empty((x.shape[0], 1), dtype=torch.float32)),
    "Meta",
)
