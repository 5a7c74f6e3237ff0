"""Which unit computes a linear whose weight has codebook groups: the table, and the function that runs what it picks."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4dit_ao.formats import CODEBOOK_SETS, NumberFormat, parse, unpack
from fp4dit_ao.kernels import codebook_linear
from fp4dit_ao.kernels.cpu import native
from fp4dit_ao.kernels.cuda import int8_linear as triton_units
from fp4dit_ao.kernels.decoded_linear import FP8_MULTIPLE
from fp4dit_ao.kernels.token_quantization import digits, fits_fp8, fp8_tokens, quantize_tokens
from fp4dit_ao.kernels.units import Unit, UnitTable
from fp4dit_ao.ops import choose_scale, fake_quantize
from fp4dit_ao.ops.codebook import codebook_dequantize

_MOST_DIGITS = 3
"""Most int8 digits of a token's level that ``torch.ops.fp4dit_ao.codebook_linear`` takes."""


class CodebookOperands(NamedTuple):
    """What decides how a linear with codebook groups is computed.

    Attributes:
        activation: format that the input is quantized to; None if it is not.
        device: of the weight and the input.
        dtype: of the input.
        shape: (out_features, in_features).
        group_size: input features that share a codebook.
        codebooks: name of the weight's set of codebooks.
    """

    activation: NumberFormat | None
    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, int]
    group_size: int
    codebooks: str


def _int8(o: CodebookOperands) -> bool:
    return o.activation is not None and digits(o.activation) <= _MOST_DIGITS


def _decoded_int8(o: CodebookOperands) -> bool:
    return _int8(o) and triton_units.decodes(o.device, o.group_size)


def _decoded_fp8(o: CodebookOperands) -> bool:
    """bfloat16 only: FP8 units round sums about as much as bfloat16 does."""
    able = (
        triton_units.decodes(o.device, o.group_size)
        and triton_units.capability(o.device) >= triton_units.FP8_CAPABILITY
    )
    aligned = all(size % FP8_MULTIPLE == 0 for size in o.shape)
    if not able or not aligned or o.dtype != torch.bfloat16 or o.activation is None:
        return False
    known = CODEBOOK_SETS.get(o.codebooks)
    return known is not None and known.is_exact_in_e4m3 and fits_fp8(o.activation)


def _on_decoded_fp8(
    x: Tensor, qdata: Tensor, index: Tensor, row_scale: Tensor, codebooks: Tensor, group_size: int,
    activation: NumberFormat | None, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    assert activation is not None
    tokens, token_scale = fp8_tokens(x, str(activation))
    y: Tensor = torch.ops.fp4dit_ao.fp8_codebook_linear(
        tokens, token_scale, qdata, index, codebooks, row_scale, bias, group_size
    )
    return y.to(x.dtype).reshape(*x.shape[:-1], qdata.shape[0])


def _on_decoded_int8(
    x: Tensor, qdata: Tensor, index: Tensor, row_scale: Tensor, codebooks: Tensor, group_size: int,
    activation: NumberFormat | None, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """The product is opaque to compilers; scales and bias are not, so that they fuse with what comes next."""
    assert activation is not None
    tokens, token_scale = quantize_tokens(x, str(activation))
    sums = torch.ops.fp4dit_ao.codebook_product(tokens, qdata, index, codebooks, group_size)
    y = codebook_linear.epilogue(sums, token_scale, row_scale, bias, x.dtype, digits(activation))
    return y.reshape(*x.shape[:-1], qdata.shape[0])


def _on_int8(
    x: Tensor, qdata: Tensor, index: Tensor, row_scale: Tensor, codebooks: Tensor, group_size: int,
    activation: NumberFormat | None, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    assert activation is not None
    tokens, token_scale = quantize_tokens(x, str(activation))
    output_dtype = x.dtype if x.dtype in native.OUTPUTS else torch.float32
    y = torch.ops.fp4dit_ao.codebook_linear(
        tokens, token_scale, qdata, index, codebooks, row_scale, bias, output_dtype, digits(activation), group_size
    )
    return y.to(x.dtype).reshape(*x.shape[:-1], qdata.shape[0])


def _on_floats(
    x: Tensor, qdata: Tensor, index: Tensor, row_scale: Tensor, codebooks: Tensor, group_size: int,
    activation: NumberFormat | None, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    codes = unpack(qdata, 4)
    books = unpack(index, 4)[:, : codes.shape[1] // group_size]
    weight = codebook_dequantize(codes, books, codebooks, row_scale, torch.float32)
    values = x.float()
    if activation is not None:
        block = [1] * (x.ndim - 1) + [-1]
        scale = choose_scale(x, block, str(activation), torch.float32)
        values = fake_quantize(x, block, scale, str(activation), torch.float32)
    return F.linear(values, weight, None if bias is None else bias.float()).to(x.dtype)


def _instruction_set() -> str:
    return next(iter(codebook_linear.kernels()))


CODEBOOK_LINEAR: UnitTable[CodebookOperands] = UnitTable(
    "linear with codebook groups",
    [
        Unit(
            "int8, compiled kernel",
            lambda o: _int8(o) and o.device.type == "cpu" and native.is_built(),
            _on_int8,
            _instruction_set,
        ),
        Unit("FP8, decoded by Triton, row-wise product", _decoded_fp8, _on_decoded_fp8),
        Unit("int8, decoded by Triton, PyTorch's product", _decoded_int8, _on_decoded_int8),
        Unit("int8, PyTorch operators", _int8, _on_int8),
        Unit("float32, dequantized", lambda o: True, _on_floats, low_bit=False),
    ],
)
"""Units for linears with codebook groups. With int8 tokens all of them compute one product of integers over all inputs, exact
but for sums on FP8 units."""


def operands(
    qdata: Tensor, group_size: int, fmt: str, act_fmt: str | None, device: torch.device, dtype: torch.dtype
) -> CodebookOperands:
    """What :data:`CODEBOOK_LINEAR` asks of a weight and its input."""
    activation = None if act_fmt is None else parse(act_fmt)
    shape = (qdata.shape[0], qdata.shape[1] * 2)
    return CodebookOperands(activation, device, dtype, shape, group_size, fmt)


def linear(
    x: Tensor,
    qdata: Tensor,
    index: Tensor,
    row_scale: Tensor,
    codebooks: Tensor,
    group_size: int,
    fmt: str,
    act_fmt: str | None,
    bias: Tensor | None,
) -> Tensor:
    """``x @ W^T + bias`` with ``W`` in codebook groups, and ``x`` quantized token-wise to ``act_fmt``.

    Args:
        x: float ``(..., in_features)``.
        qdata: uint8 ``(out_features, in_features / 2)``, two codes a byte, the first in the low nibble.
        index: uint8 ``(out_features, ceil(groups / 2))``, each group's codebook, packed likewise.
        row_scale: float ``(out_features,)``.
        codebooks: int8 ``(16, 16)``, levels by codebook and code.
        group_size: input features that share a codebook.
        fmt: name of the set of codebooks; of one that is not known, nothing but int8 levels is assumed.
        act_fmt: activation format; None multiplies ``x`` as it is.
        bias: ``(out_features,)`` or None.

    Returns:
        ``(..., out_features)`` in the type of ``x``.
    """
    found = operands(qdata, group_size, fmt, act_fmt, x.device, x.dtype)
    unit = CODEBOOK_LINEAR.pick(found)
    y: Tensor = unit.run(x, qdata, index, row_scale, codebooks, group_size, found.activation, bias)
    return y
