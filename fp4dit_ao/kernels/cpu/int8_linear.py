"""``torch.ops.fp4dit_ao.int8_linear`` on CPUs: int8 tokens times 4-bit weights, by the compiled library."""

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fp4dit_ao.formats import NumberFormat
from fp4dit_ao.kernels import flop_counts
from fp4dit_ao.kernels.checks import refuse
from fp4dit_ao.kernels.cpu import native
from fp4dit_ao.ops import LIBRARY

_MOST_BITS = 4
_MULTIPLE = 4
"""Group sizes are multiples of this: the kernels read the levels of four input features at once."""
_MOST_DIGITS = 3
_LARGEST_LEVEL = 127
_FAILURES = ("out of memory", "this kernel is missing or cannot take such groups")
"""What the library's error numbers 1 and 2 mean."""


def supports(device: torch.device, bits: int, group_size: int) -> bool:
    """Whether ``int8_linear`` takes weights of so many bits and groups of that size on the device."""
    fits = device.type == "cpu" and bits <= _MOST_BITS and group_size % _MULTIPLE == 0
    return fits and native.is_built()


@functools.cache
def level_table(fmt: NumberFormat) -> list[int]:
    """The level of each code of a format of at most 4 bits, zeros up to sixteen."""
    return [fmt.level(code) for code in range(2**fmt.bits)] + [0] * (16 - 2**fmt.bits)


@functools.cache
def _table_for_library(table: tuple[int, ...]) -> ctypes.Array[ctypes.c_int8] | None:
    """Sixteen int8 levels as a C array; None if they are not."""
    fits = len(table) == 16 and all(abs(level) <= _LARGEST_LEVEL for level in table)
    return (ctypes.c_int8 * 16)(*table) if fits else None


@functools.cache
def _number(kernel: str | None) -> int:
    """The library's number for an instruction set; -1 leaves the choice to it."""
    known = native.kernels()
    if kernel is None:
        return -1
    if kernel not in known:
        refuse("int8_linear", "kernel", repr(kernel), f"one of {', '.join(known)}, which this processor has")
    return known[kernel]


def run(
    tokens: Tensor,
    token_scale: Tensor,
    qdata: Tensor,
    scale: Tensor,
    table: Sequence[int],
    bias: Tensor | None,
    output_dtype: torch.dtype,
    digits: int = 1,
    kernel: str | None = None,
) -> Tensor:
    """``(tokens @ levels^T, group by group times scale) * token_scale + bias``.

    Products are exact, sums of groups float32.

    Args:
        tokens: int8 ``(digits * rows, in_features)``, -127 to 127; the highest digit of all rows first.
        token_scale: float32 ``(rows, 1)``.
        qdata: uint8 ``(out_features, in_features / 2)``, two codes a byte, the first in the low nibble.
        scale: float ``(out_features or 1, groups)``.
        table: level of each code, sixteen of -127 to 127.
        bias: ``(out_features,)`` or None.
        output_dtype: float32, bfloat16 or float16.
        digits: int8 digits to the base 128 of each level of the tokens, 1 to 3.
        kernel: one of ``native.kernels()``; None takes the best for that many rows and such groups. The operator has no such
            argument.

    Returns:
        ``(rows, out_features)`` of ``output_dtype``.

    Raises:
        ValueError: an argument does not fit (it says which, what was found and what was expected); nothing is read out of
            bounds.
        RuntimeError: no library, no memory, or a kernel that cannot take such groups.
    """
    opened = native.opened_library("int8_linear")
    entries = _table_for_library(tuple(table))
    _check(tokens, token_scale, qdata, scale, table, entries, bias, output_dtype, digits)
    (rows, depth), (features, groups) = tokens.shape, (qdata.shape[0], scale.shape[1])
    rows //= digits
    arrays = [tokens.contiguous(), token_scale.float().contiguous(), qdata.contiguous(), scale.float().contiguous()]
    added = None if bias is None else bias.float().contiguous()
    out = torch.empty((rows, features), dtype=output_dtype)
    failed = opened.fp4dit_linear(
        *(array.data_ptr() for array in arrays), entries, None if added is None else added.data_ptr(),
        out.data_ptr(), rows, features, depth, depth // max(1, groups), scale.shape[0], digits, native.OUTPUTS[output_dtype],
        _number(kernel), native.parallel(), torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise RuntimeError(f"int8_linear: {_FAILURES[failed - 1]}")
    return out


def _check(
    tokens: Tensor,
    token_scale: Tensor,
    qdata: Tensor,
    scale: Tensor,
    table: Sequence[int],
    entries: object,
    bias: Tensor | None,
    output_dtype: torch.dtype,
    digits: int,
) -> None:
    name = "int8_linear"
    if not tokens.ndim == qdata.ndim == scale.ndim == 2:
        shapes = {"tokens": tokens.shape, "qdata": qdata.shape, "scale": scale.shape}
        argument, shape = next((key, tuple(found)) for key, found in shapes.items() if len(found) != 2)
        refuse(name, argument, f"shape {shape}", "two dimensions")
    (rows, depth), (features, packed), (scale_rows, groups) = tokens.shape, qdata.shape, scale.shape
    if tokens.dtype != torch.int8:
        refuse(name, "tokens", tokens.dtype, torch.int8)
    if qdata.dtype != torch.uint8:
        refuse(name, "qdata", qdata.dtype, torch.uint8)
    if packed * 2 != depth:
        refuse(
            name, "qdata", f"rows of {packed} bytes", f"{depth / 2:g}, for the {depth} features of tokens, two a byte"
        )
    if scale_rows != features and scale_rows != 1:
        refuse(name, "scale", f"{scale_rows} rows", f"1 or {features}, one for each row of qdata")
    if not groups or not depth or depth % groups or depth // groups % _MULTIPLE:
        refuse(name, "scale", f"{groups} groups", f"a number that cuts {depth} features into multiples of {_MULTIPLE}")
    if not 1 <= digits <= _MOST_DIGITS:
        refuse(name, "digits", digits, f"1 to {_MOST_DIGITS}")
    if rows != digits * token_scale.numel():
        refuse(
            name,
            "token_scale",
            f"{token_scale.numel()} scales",
            f"{rows / digits:g}, for {rows} rows of {digits} digits",
        )
    if bias is not None and bias.shape != (features,):
        refuse(name, "bias", f"shape {tuple(bias.shape)}", f"{(features,)}")
    if entries is None:
        refuse(name, "table", list(table), f"sixteen levels within +-{_LARGEST_LEVEL}")
    if output_dtype not in native.OUTPUTS:
        refuse(name, "output_dtype", output_dtype, f"one of {', '.join(map(str, native.OUTPUTS))}")


LIBRARY.define(
    "int8_linear(Tensor tokens, Tensor token_scale, Tensor qdata, Tensor scale, int[] table, Tensor? bias, "
    "ScalarType output_dtype, int digits=1) -> Tensor",
    tags=(torch.Tag.flexible_layout,),  # else Inductor copies what several linears share
)
LIBRARY.impl("int8_linear", run, "CPU")
LIBRARY.impl(
    "int8_linear",
    lambda tokens, token_scale, qdata, scale, table, bias, output_dtype, digits=1: tokens.new_empty(
        (token_scale.shape[0], qdata.shape[0]), dtype=output_dtype
    ),
    "Meta",
)
flop_counts.register("int8_linear", flop_counts.linear)
