"""``torch.ops.fp4dit_ao.quantized_codebook_linear``: token-wise quantization and a linear with codebook groups, at once."""

import math

import torch
from torch import Tensor

from fp4dit_ao.formats import parse
from fp4dit_ao.kernels import codebook_linear, flop_counts, token_quantization
from fp4dit_ao.kernels.cpu import native
from fp4dit_ao.ops import LIBRARY


def run(
    x: Tensor,
    fmt: str,
    qdata: Tensor,
    index: Tensor,
    codebooks: Tensor,
    row_scale: Tensor,
    bias: Tensor | None,
    output_dtype: torch.dtype,
    group_size: int = 128,
    kernel: str | None = None,
) -> Tensor:
    """``quantize_tokens`` and ``codebook_linear`` at once, to the bit: ``torch.ops.fp4dit_ao.quantized_codebook_linear``.

    The compiled library quantizes tokens as it lays them out, so that levels are never written to memory. For a value that
    one linear reads; what several read is better quantized once.

    Args:
        x: float ``(..., in_features)``.
        fmt: of the tokens; see :func:`fp4dit_ao.kernels.token_quantization.quantize_tokens`.

    Returns:
        ``(..., out_features)`` of ``output_dtype``.

    The other arguments are those of :func:`fp4dit_ao.kernels.codebook_linear.reference_codebook_linear`.
    """
    opened = native.shared_object()
    if opened is None or not token_quantization.in_compiled_loop(x, fmt):
        levels, scale = token_quantization.quantize_tokens(x, fmt)
        weight = (
            qdata,
            index,
            codebooks,
            row_scale,
            bias,
            output_dtype,
            token_quantization.digits(parse(fmt)),
            group_size,
        )
        y = torch.ops.fp4dit_ao.codebook_linear(levels, scale, *weight)
        return y.unflatten(0, x.shape[:-1])
    rows, depth = math.prod(x.shape[:-1]), x.shape[-1]
    mantissa_bits, digits, largest = token_quantization.numbers(fmt)
    codebook_linear.check_weight(depth, qdata, index, codebooks, row_scale, bias, output_dtype, digits, group_size)
    features = qdata.shape[0]
    added = None if bias is None else codebook_linear.contiguous(bias.float())
    arrays = tuple(map(codebook_linear.contiguous, (x.detach(), qdata, index, codebooks, row_scale.float())))
    out = torch.empty((*x.shape[:-1], features), dtype=output_dtype)
    failed = opened.fp4dit_quantized_codebook_linear(
        *(array.data_ptr() for array in arrays), None if added is None else added.data_ptr(), out.data_ptr(),
        rows, features, depth, group_size, native.OUTPUTS[x.dtype], mantissa_bits, digits, largest,
        native.OUTPUTS[output_dtype], codebook_linear.kernel_number(kernel), native.parallel(), torch.get_num_threads(),
    )  # fmt: skip
    codebook_linear.raise_failure(failed, kernel, group_size)
    return out


LIBRARY.define(
    "quantized_codebook_linear(Tensor x, str fmt, Tensor qdata, Tensor index, Tensor codebooks, Tensor row_scale, "
    "Tensor? bias, ScalarType output_dtype, int group_size=128) -> Tensor"
)
LIBRARY.impl("quantized_codebook_linear", run, "CPU")
LIBRARY.impl("quantized_codebook_linear", run, "CUDA")
LIBRARY.impl(
    "quantized_codebook_linear",
    lambda x, fmt, qdata, index, codebooks, row_scale, bias, output_dtype, group_size=128: x.new_empty(
        (*x.shape[:-1], qdata.shape[0]), dtype=output_dtype
    ),
    "Meta",
)
flop_counts.register("quantized_codebook_linear", flop_counts.linear)
