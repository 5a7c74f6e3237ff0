"""``torch.ops.fp4dit_ao.codebook_linear``: int8 tokens times 4-bit weights that have a codebook for every group.

A weight is ``row_scale[n] * codebooks[index[n, k // group_size]][code[n, k]]``. Levels are int8, so the product is one int8
product over all input features; the token's and the row's scale are multiplied in afterwards.
:func:`reference_codebook_linear` is the specification. On CPUs the compiled library computes the same bits.
"""

import functools

import torch
from torch import Tensor

from fp4dit_ao.formats import unpack
from fp4dit_ao.kernels import flop_counts
from fp4dit_ao.kernels.cpu import native
from fp4dit_ao.kernels.integer_product import integer_product
from fp4dit_ao.ops import LIBRARY

BOOKS = 16
"""Codebooks, and levels of each."""
MOST_FEATURES = 2**31 // (128 * 128)
"""Input features whose products with int8 tokens an int32 holds, whatever they are."""
_MOST_DIGITS = 3
_BASE = 128


def kernels() -> dict[str, int]:
    """Instruction sets that this processor has for this operator, best first, with the library's number for each."""
    opened = native.shared_object()
    return {} if opened is None else native.instruction_sets(opened.fp4dit_codebook_kernel)


def reference_codebook_linear(
    tokens: Tensor,
    token_scale: Tensor,
    qdata: Tensor,
    index: Tensor,
    codebooks: Tensor,
    row_scale: Tensor,
    bias: Tensor | None,
    output_dtype: torch.dtype,
    digits: int = 1,
    group_size: int = 128,
) -> Tensor:
    """``(tokens @ levels^T) * token_scale * row_scale + bias`` on PyTorch's operators: the specification.

    Sums of products are exact, digits of a token are added exactly, and the total is rounded to float32 once. Each
    multiplication and the addition round to float32, then the result to ``output_dtype``.

    Args:
        tokens: int8 ``(digits * rows, in_features)``, -127 to 127; the highest digit of all rows first.
        token_scale: float32 ``(rows, 1)`` or ``(rows,)``.
        qdata: uint8 ``(out_features, in_features / 2)``, two codes a byte, the first in the low nibble.
        index: uint8 ``(out_features, ceil(groups / 2))``, each group's codebook, packed likewise.
        codebooks: int8 ``(16, 16)``: what each code stands for.
        row_scale: float ``(out_features,)`` or ``(out_features, 1)``.
        bias: ``(out_features,)`` or None.
        output_dtype: float32, bfloat16 or float16.
        digits: 1 to 3, to the base 128, of each level of the tokens.
        group_size: input features that share a codebook; a multiple of 4 that divides ``in_features``.

    Returns:
        ``(rows, out_features)`` of ``output_dtype``.

    Raises:
        ValueError: an argument does not fit.
    """
    check(tokens, token_scale, qdata, index, codebooks, row_scale, bias, output_dtype, digits, group_size)
    sums = integer_product(tokens, decode(qdata, index, codebooks, group_size))
    return epilogue(sums, token_scale, row_scale, bias, output_dtype, digits)


def epilogue(
    sums: Tensor, token_scale: Tensor, row_scale: Tensor, bias: Tensor | None, output_dtype: torch.dtype, digits: int
) -> Tensor:
    """From int32 products with each digit, ``(digits * rows, out_features)``, to the result."""
    if digits == 1:
        y = sums.float()
    else:
        total, *lower = (
            sums.double().unflatten(0, (digits, -1)).unbind()
        )  # float64 holds the sum of three digits exactly
        for digit in lower:
            total = total * _BASE + digit
        y = total.float()
    y = y * token_scale.float().reshape(-1, 1) * row_scale.float().reshape(1, -1)
    return (y if bias is None else y + bias.float()).to(output_dtype)


def decode(qdata: Tensor, index: Tensor, codebooks: Tensor, group_size: int) -> Tensor:
    """Levels of the weight: int8 ``(out_features, in_features)``."""
    codes = unpack(qdata, 4)
    books = unpack(index, 4)[:, : codes.shape[1] // group_size]
    return codebooks[books.int().repeat_interleave(group_size, 1), codes.int()]


def run(
    tokens: Tensor,
    token_scale: Tensor,
    qdata: Tensor,
    index: Tensor,
    codebooks: Tensor,
    row_scale: Tensor,
    bias: Tensor | None,
    output_dtype: torch.dtype,
    digits: int = 1,
    group_size: int = 128,
    kernel: str | None = None,
) -> Tensor:
    """What :func:`reference_codebook_linear` gives, to the bit, by the compiled library where there is one.

    Args:
        kernel: one of :func:`kernels`; None takes the best for that many rows. The operator has no such argument.

    Raises:
        ValueError: an argument does not fit; nothing is read out of bounds.
        RuntimeError: no memory, or a kernel that cannot take such groups or levels.
    """
    opened = native.shared_object()
    if opened is None:
        return reference_codebook_linear(
            tokens, token_scale, qdata, index, codebooks, row_scale, bias, output_dtype, digits, group_size
        )
    check(tokens, token_scale, qdata, index, codebooks, row_scale, bias, output_dtype, digits, group_size)
    rows, features = token_scale.numel(), qdata.shape[0]
    added = None if bias is None else contiguous(bias.float())
    given = tokens, token_scale.float(), qdata, index, codebooks, row_scale.float()
    arrays = [contiguous(x) for x in given]  # what is copied lives until the call returns
    out = torch.empty((rows, features), dtype=output_dtype)
    failed = opened.fp4dit_codebook_linear(
        *(array.data_ptr() for array in arrays), None if added is None else added.data_ptr(), out.data_ptr(),
        rows, features, tokens.shape[1], group_size, digits, native.OUTPUTS[output_dtype],
        kernel_number(kernel), native.parallel(), torch.get_num_threads(),
    )  # fmt: skip
    raise_failure(failed, kernel, group_size)
    return out


def raise_failure(failed: int, kernel: str | None, group_size: int) -> None:
    """Says what the library's result other than 0 means."""
    if failed:
        reason = ("out of memory", f"kernel {kernel} cannot take groups of {group_size}, or such levels")[failed - 1]
        raise RuntimeError(f"codebook_linear: {reason}")


def contiguous(x: Tensor) -> Tensor:
    """``x.contiguous()``, more quickly where it is."""
    return x if x.is_contiguous() else x.contiguous()


@functools.cache
def kernel_number(kernel: str | None) -> int:
    """The library's number for a kernel; -1 leaves the choice to it."""
    return -1 if kernel is None else kernels()[kernel]


def check(
    tokens: Tensor,
    token_scale: Tensor,
    qdata: Tensor,
    index: Tensor,
    codebooks: Tensor,
    row_scale: Tensor,
    bias: Tensor | None,
    output_dtype: torch.dtype,
    digits: int,
    group_size: int,
) -> None:
    """Refuses what does not fit.

    Raises:
        ValueError: which argument, what was found, what was expected.
    """
    if tokens.dtype != torch.int8 or tokens.ndim != 2:
        _refuse("tokens", f"{tokens.dtype} with {tokens.ndim} dimensions", f"{torch.int8} with 2")
    rows, depth = tokens.shape
    check_weight(depth, qdata, index, codebooks, row_scale, bias, output_dtype, digits, group_size)
    if rows != digits * token_scale.numel():
        _refuse("token_scale", f"{token_scale.numel()} scales", f"one for each of {rows} rows by {digits} digits")


def check_weight(
    depth: int,
    qdata: Tensor,
    index: Tensor,
    codebooks: Tensor,
    row_scale: Tensor,
    bias: Tensor | None,
    output_dtype: torch.dtype,
    digits: int,
    group_size: int,
) -> None:
    """Refuses a weight that does not fit ``depth`` input features; see :func:`check`."""
    for name, x, dtype, dims in (
        ("qdata", qdata, torch.uint8, 2),
        ("index", index, torch.uint8, 2),
        ("codebooks", codebooks, torch.int8, 2),
    ):
        if x.dtype != dtype or x.ndim != dims:
            _refuse(name, f"{x.dtype} with {x.ndim} dimensions", f"{dtype} with {dims}")
    if not 1 <= digits <= _MOST_DIGITS:
        _refuse("digits", digits, f"1 to {_MOST_DIGITS}")
    features = qdata.shape[0]
    if group_size < 4 or group_size % 4:
        _refuse("group_size", group_size, "a positive multiple of 4")
    if not depth or depth % group_size:
        _refuse("tokens", f"{depth} input features", f"a positive multiple of the group size {group_size}")
    if depth > MOST_FEATURES:
        _refuse("tokens", f"{depth} input features", f"at most {MOST_FEATURES}, whose sums fit into an int32")
    if qdata.shape[1] * 2 != depth:
        _refuse("qdata", f"rows of {qdata.shape[1]} bytes", f"two of {depth} codes a byte")
    packed = (features, (depth // group_size + 1) // 2)
    if index.shape != packed:
        _refuse("index", f"shape {tuple(index.shape)}", f"{packed}, for two groups a byte")
    if codebooks.shape != (BOOKS, BOOKS):
        _refuse("codebooks", f"shape {tuple(codebooks.shape)}", f"{(BOOKS, BOOKS)}")
    if row_scale.numel() != features:
        _refuse("row_scale", f"{row_scale.numel()} scales", f"one for each of {features} output features")
    if bias is not None and bias.shape != (features,):
        _refuse("bias", f"shape {tuple(bias.shape)}", f"{(features,)}")
    if output_dtype not in native.OUTPUTS:
        _refuse("output_dtype", output_dtype, ", ".join(map(str, native.OUTPUTS)))


def _refuse(name: str, found: object, expected: str) -> None:
    raise ValueError(f"codebook_linear: {name} has {found}; expected {expected}")


def _shapes(
    tokens: Tensor,
    token_scale: Tensor,
    qdata: Tensor,
    index: Tensor,
    codebooks: Tensor,
    row_scale: Tensor,
    bias: Tensor | None,
    output_dtype: torch.dtype,
    digits: int = 1,
    group_size: int = 128,
) -> Tensor:
    return tokens.new_empty((token_scale.numel(), qdata.shape[0]), dtype=output_dtype)


LIBRARY.define(
    "codebook_linear(Tensor tokens, Tensor token_scale, Tensor qdata, Tensor index, Tensor codebooks, Tensor row_scale, "
    "Tensor? bias, ScalarType output_dtype, int digits=1, int group_size=128) -> Tensor",
    tags=(torch.Tag.flexible_layout,),  # else Inductor copies what several linears share
)
LIBRARY.impl("codebook_linear", run, "CPU")
LIBRARY.impl("codebook_linear", _shapes, "Meta")
flop_counts.register("codebook_linear", flop_counts.linear)
