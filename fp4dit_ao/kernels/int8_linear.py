"""int8 x int8 -> int32 multiplication of lattice integers: exact for int8 levels of weights times int8 digits of tokens.

Two units for packed weights: the operator ``int8_linear`` (compiled kernel on CPUs, Triton on GPUs), which looks codes up while
it multiplies, and PyTorch's operators, which need the levels unpacked.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fp4dit_ao.formats import NumberFormat, unpack
from fp4dit_ao.kernels.cpu.int8_linear import level_table
from fp4dit_ao.kernels.cpu.native import OUTPUTS
from fp4dit_ao.kernels.integer_product import integer_product
from fp4dit_ao.kernels.token_quantization import MOST_DIGITS, add_digits, digits, quantize_tokens


def exact(weight: NumberFormat, activation: NumberFormat | None) -> bool:
    """Whether int8 products compute the pair: every weight level is an int8, every token level a few int8 digits."""
    return activation is not None and weight.fits_int8 and digits(activation) <= MOST_DIGITS


def on_packed_codes(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    block_size: Sequence[int],
    fmt: NumberFormat,
    act_fmt: NumberFormat,
    bias: Tensor | None,
) -> Tensor:
    """See :func:`fp4dit_ao.kernels.linear`. One operator multiplies packed codes, on CPUs and on GPUs."""
    tokens, token_scale = quantize_tokens(x, str(act_fmt))
    output_dtype = x.dtype if x.dtype in OUTPUTS else torch.float32
    y: Tensor = torch.ops.fp4dit_ao.int8_linear(
        tokens, token_scale, qdata, scale, level_table(fmt), bias, output_dtype, digits(act_fmt)
    )
    return y.to(x.dtype).reshape(*x.shape[:-1], qdata.shape[0])


def on_operators(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    block_size: Sequence[int],
    fmt: NumberFormat,
    act_fmt: NumberFormat,
    bias: Tensor | None,
) -> Tensor:
    """See :func:`fp4dit_ao.kernels.linear`. Codes become int8 levels, which PyTorch's operators multiply."""
    tokens, token_scale = quantize_tokens(x, str(act_fmt))
    levels = fmt.decode(unpack(qdata, fmt.bits)).to(torch.int8)
    y = add_digits(group_products(tokens, levels, scale), digits(act_fmt)) * token_scale
    y = y if bias is None else y + bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], qdata.shape[0])


def group_products(tokens: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
    """The float32 sum of every group's int32 product times the group's scale, on PyTorch's operators.

    Args:
        tokens: int8 ``(rows, in_features)``.
        levels: int8 ``(out_features, in_features)``.
        scale: float ``(out_features or 1, groups)``.

    Returns:
        float32 ``(rows, out_features)``.
    """
    groups = scale.shape[1]
    y = torch.zeros((), dtype=torch.float32, device=tokens.device)
    for x, w, s in zip(tokens.chunk(groups, 1), levels.chunk(groups, 1), scale.float().unbind(1), strict=True):
        y = y + integer_product(x, w).float() * s
    return y
