"""Linears with codebook groups on NVIDIA GPUs: decode the packed weight to bytes, then one vendor product of bytes; or, for few
tokens, one kernel that does both where it is faster.

The bytes live from the decoding kernel to the end of the product, in memory that the allocator hands to the next layer again:
a model's weights stay packed, and one buffer of the largest layer's size serves all. Both operators hold decoding and product
together, so that no compiler moves decoding away from its product or keeps its result.

int8 products (``torch._int_mm``) are exact. FP8 products (``torch._scaled_mm``) have exact operands and products, but sums as
exact as the tensor core's accumulator; ``python -m benchmarks.gpu --part linears`` prints how far they are from float64.

All of it runs on CPUs, too, with levels decoded by PyTorch's operators: that is how its numbers are tested without a GPU.
"""

from types import ModuleType

import torch
from torch import Tensor

from fp4dit_ao import _compat
from fp4dit_ao.kernels import codebook_linear, flop_counts
from fp4dit_ao.kernels.cuda import int8_linear as triton_units
from fp4dit_ao.kernels.integer_product import integer_product
from fp4dit_ao.ops import LIBRARY

FP8 = torch.float8_e4m3fn
FP8_MULTIPLE = 16
"""Input and output features that the FP8 product takes are multiples of this."""


def decoded(qdata: Tensor, index: Tensor, codebooks: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """The weight's levels as ``dtype`` (int8 or float8_e4m3fn), ``(out_features, in_features)``."""
    if triton_units.decodes(qdata.device, group_size):
        from fp4dit_ao.kernels.cuda import triton_decode

        return triton_decode.decode(qdata, index, codebooks, group_size, dtype)
    return codebook_linear.decode(qdata, index, codebooks, group_size).to(dtype)


def codebook_product(tokens: Tensor, qdata: Tensor, index: Tensor, codebooks: Tensor, group_size: int) -> Tensor:
    """``tokens @ levels^T``, exact: int32 ``(rows, out_features)``.

    Args:
        tokens: int8 ``(rows, in_features)``.
        qdata, index, codebooks, group_size: see :func:`fp4dit_ao.kernels.codebook_linear.reference_codebook_linear`.
    """
    few_tokens = _few_tokens(tokens, group_size)

    def by(config: object) -> Tensor:
        if config is None or few_tokens is None:
            return integer_product(tokens, decoded(qdata, index, codebooks, group_size, torch.int8))
        product: Tensor = few_tokens.product(tokens, qdata, index, codebooks, group_size, config)
        return product

    return by(few_tokens and few_tokens.chosen(tokens, qdata.shape[0], group_size, by))


def fp8_codebook_linear(
    tokens: Tensor,
    token_scale: Tensor,
    qdata: Tensor,
    index: Tensor,
    codebooks: Tensor,
    row_scale: Tensor,
    bias: Tensor | None,
    group_size: int,
) -> Tensor:
    """``(tokens @ levels^T) * token_scale * row_scale + bias``, bfloat16 ``(rows, out_features)``, on FP8 units.

    Args:
        tokens: float8_e4m3fn ``(rows, in_features)``.
        token_scale: float32 ``(rows, 1)``.
        qdata, index, codebooks, group_size: as above; float8_e4m3fn must hold every level of the codebooks.
        row_scale: float32 ``(out_features,)``.
        bias: ``(out_features,)`` or None.
    """
    few_tokens = _few_tokens(tokens, group_size)

    def by(config: object) -> Tensor:
        if config is not None and few_tokens is not None:
            weight = qdata, index, codebooks, row_scale, bias
            y: Tensor = few_tokens.linear(tokens, token_scale, *weight, group_size, torch.bfloat16, config)
            return y
        levels = decoded(qdata, index, codebooks, group_size, FP8)
        columns = row_scale.float().reshape(1, -1)
        added = None if bias is None else bias.bfloat16()
        return _compat.fp8_product(
            tokens.contiguous(), levels.T, token_scale, columns, torch.bfloat16, added, fast=True
        )

    return by(few_tokens and few_tokens.chosen(tokens, qdata.shape[0], group_size, by))


def _few_tokens(tokens: Tensor, group_size: int) -> ModuleType | None:
    """The module of the kernel that decodes as it multiplies, where it may run; else None."""
    if not triton_units.decodes(tokens.device, group_size):
        return None
    from fp4dit_ao.kernels.cuda import triton_codebook_linear

    return triton_codebook_linear


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
) -> Tensor:
    """See :func:`fp4dit_ao.kernels.codebook_linear.reference_codebook_linear`, whose bits it gives."""
    codebook_linear.check(
        tokens, token_scale, qdata, index, codebooks, row_scale, bias, output_dtype, digits, group_size
    )
    sums = codebook_product(tokens, qdata, index, codebooks, group_size)
    return codebook_linear.epilogue(sums, token_scale, row_scale, bias, output_dtype, digits)


LIBRARY.impl("codebook_linear", run, "CUDA")
LIBRARY.define(
    "codebook_product(Tensor tokens, Tensor qdata, Tensor index, Tensor codebooks, int group_size) -> Tensor",
    tags=(torch.Tag.flexible_layout,),
)
LIBRARY.define(
    "fp8_codebook_linear(Tensor tokens, Tensor token_scale, Tensor qdata, Tensor index, Tensor codebooks, "
    "Tensor row_scale, Tensor? bias, int group_size) -> Tensor",
    tags=(torch.Tag.flexible_layout,),
)
for _key in ("CPU", "CUDA"):
    LIBRARY.impl("codebook_product", codebook_product, _key)
    LIBRARY.impl("fp8_codebook_linear", fp8_codebook_linear, _key)
LIBRARY.impl(
    "codebook_product",
    lambda tokens, qdata, index, codebooks, group_size: tokens.new_empty(
        (tokens.shape[0], qdata.shape[0]), dtype=torch.int32
    ),
    "Meta",
)
LIBRARY.impl(
    "fp8_codebook_linear",
    lambda tokens, token_scale, qdata, index, codebooks, row_scale, bias, group_size: tokens.new_empty(
        (tokens.shape[0], qdata.shape[0]), dtype=torch.bfloat16
    ),
    "Meta",
)
flop_counts.register("codebook_product", flop_counts.linear)
flop_counts.register("fp8_codebook_linear", flop_counts.linear)
