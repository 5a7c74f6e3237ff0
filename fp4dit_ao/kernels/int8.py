"""int8 x int8 -> int32 multiplication of lattice integers: exact for every pair of formats whose levels are int8."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4dit_ao.formats import FloatFormat, unpack
from fp4dit_ao.kernels import gpu, native
from fp4dit_ao.kernels.tokens import quantize_tokens

_CUDA_ROWS = 32
"""cuBLAS's int8 product wants more than 16 rows."""


def supports(fmt: FloatFormat, act_fmt: FloatFormat | None) -> bool:
    return act_fmt is not None and fmt.fits_int8 and act_fmt.fits_int8


def linear(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    block_size: Sequence[int],
    fmt: FloatFormat,
    act_fmt: FloatFormat | None,
    bias: Tensor | None,
) -> Tensor:
    """See :func:`fp4dit_ao.kernels.linear`. One integer product per group of K, converted once, times the group's scale."""
    assert act_fmt is not None
    features = x.shape[-1]
    group = features if block_size[1] == -1 else block_size[1]
    rounded, token_scale = quantize_tokens(x, str(act_fmt))
    if native.supports(x, fmt.bits, group) or gpu.supports(x, fmt.bits, group):
        output_dtype = x.dtype if x.dtype in native.OUTPUTS else torch.float32
        table = native.levels(fmt)
        y = torch.ops.fp4dit_ao.int8_linear(rounded, token_scale, qdata, scale, table, bias, output_dtype)
    else:
        y = _products(rounded, fmt.decode(unpack(qdata, fmt.bits)).to(torch.int8), scale, group) * token_scale
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
