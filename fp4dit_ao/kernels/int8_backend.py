"""int8 x int8 -> int32 multiplication of lattice integers: exact for weights whose levels are int8, times int8 digits."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4dit_ao.formats import NumberFormat, unpack
from fp4dit_ao.kernels.cpu import native
from fp4dit_ao.kernels.cuda import int8_linear
from fp4dit_ao.kernels.token_quantization import add_digits, digits, quantize_tokens

_CUDA_ROWS = 32
"""cuBLAS's int8 product wants more than 16 rows."""
_DIGITS = 3
"""E4M3 takes as many; formats with more are multiplied as floats."""


def supports(fmt: NumberFormat, act_fmt: NumberFormat | None) -> bool:
    return act_fmt is not None and fmt.fits_int8 and digits(act_fmt) <= _DIGITS


def linear(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    block_size: Sequence[int],
    fmt: NumberFormat,
    act_fmt: NumberFormat | None,
    bias: Tensor | None,
) -> Tensor:
    """See :func:`fp4dit_ao.kernels.linear`. One integer product per group of K, converted once, times the group's scale."""
    assert act_fmt is not None
    features = x.shape[-1]
    group = features if block_size[1] == -1 else block_size[1]
    rounded, token_scale = quantize_tokens(x, str(act_fmt))
    count = digits(act_fmt)
    if native.supports(x, fmt.bits, group) or int8_linear.supports(x, fmt.bits, group):
        output_dtype = x.dtype if x.dtype in native.OUTPUTS else torch.float32
        y = torch.ops.fp4dit_ao.int8_linear(
            rounded, token_scale, qdata, scale, native.levels(fmt), bias, output_dtype, count
        )
    else:
        y = _products(rounded, fmt.decode(unpack(qdata, fmt.bits)).to(torch.int8), scale, group)
        y = add_digits(y, count) * token_scale
        y = y if bias is None else y + bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], qdata.shape[0])


def _products(tokens: Tensor, levels: Tensor, scale: Tensor, group: int) -> Tensor:
    """The float32 sum of every group's int32 product, on PyTorch's operators."""
    rows, features = tokens.shape
    if tokens.is_cuda:
        tokens = F.pad(tokens, (0, 0, 0, _CUDA_ROWS))
    y = torch.zeros((), dtype=torch.float32, device=tokens.device)
    for index in range(features // group):
        columns = slice(index * group, (index + 1) * group)
        product = torch._int_mm(tokens[:, columns].contiguous(), levels[:, columns].contiguous().T)
        y = y + product[:rows].float() * scale[:, index].float()
    return y
