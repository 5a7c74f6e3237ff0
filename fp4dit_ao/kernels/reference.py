"""float32 multiplication of dequantized weights: computes any pair of formats, and specifies what the other units compute."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4dit_ao.formats import NumberFormat, unpack
from fp4dit_ao.ops import choose_scale, dequantize


def linear(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    block_size: Sequence[int],
    fmt: NumberFormat,
    act_fmt: NumberFormat | None,
    bias: Tensor | None,
) -> Tensor:
    """See :func:`fp4dit_ao.kernels.linear`. The token's scale is applied after the product, as in the int8 units."""
    weight = dequantize(unpack(qdata, fmt.bits), block_size, scale, str(fmt), torch.float32)
    if act_fmt is None:
        y = F.linear(x.float(), weight)
    else:
        token_scale = choose_scale(x, [1] * (x.ndim - 1) + [-1], str(act_fmt), torch.float32)
        y = F.linear(act_fmt.round(x.float() / token_scale), weight) * token_scale
    return (y if bias is None else y + bias.float()).to(x.dtype)
