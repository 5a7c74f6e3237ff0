"""Which unit computes a linear with packed weights: the table, and the function that runs what it picks.

The order follows from the lattices: operands are small integers, so a product runs *exactly* on the cheapest unit in which both
lattices embed. Every unit has the signature of :func:`linear`, with formats in place of their names.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fp4dit_ao.formats import NumberFormat, parse
from fp4dit_ao.kernels import int8_linear, reference
from fp4dit_ao.kernels.attention import ATTENTION
from fp4dit_ao.kernels.block_scaled_linear import BLOCK_SCALED_LINEAR
from fp4dit_ao.kernels.candidate_search import CANDIDATE_SEARCH
from fp4dit_ao.kernels.codebook_dispatch import CODEBOOK_LINEAR
from fp4dit_ao.kernels.cpu import int8_linear as compiled_linear
from fp4dit_ao.kernels.cpu import native
from fp4dit_ao.kernels.cuda import int8_linear as triton_linear
from fp4dit_ao.kernels.level_linear import LEVEL_LINEAR
from fp4dit_ao.kernels.token_quantization import TOKENS
from fp4dit_ao.kernels.units import Unit, UnitTable


class LinearOperands(NamedTuple):
    """What decides how a linear with packed weights is computed.

    Attributes:
        weight: format of the weight.
        activation: format that the input is quantized to; None if it is not.
        device: of both.
        group_size: input features that share a scale.
    """

    weight: NumberFormat
    activation: NumberFormat | None
    device: torch.device
    group_size: int


def _int8(o: LinearOperands) -> bool:
    return int8_linear.exact(o.weight, o.activation)


LINEAR: UnitTable[LinearOperands] = UnitTable(
    "linear",
    [
        Unit(
            "int8, compiled kernel",
            lambda o: _int8(o) and compiled_linear.supports(o.device, o.weight.bits, o.group_size),
            int8_linear.on_packed_codes,
            native.instruction_set,
        ),
        Unit(
            "int8, Triton",
            lambda o: _int8(o) and triton_linear.supports(o.device, o.weight.bits, o.group_size),
            int8_linear.on_packed_codes,
        ),
        Unit("int8, PyTorch operators", _int8, int8_linear.on_operators),
        Unit("float32, dequantized", lambda o: True, reference.linear, low_bit=False),
    ],
)

TABLES = {
    table.operation: table
    for table in (LINEAR, CODEBOOK_LINEAR, LEVEL_LINEAR, BLOCK_SCALED_LINEAR, ATTENTION, TOKENS, CANDIDATE_SEARCH)
}
"""Every operation that is computed differently from device to device, by name."""


def pick(
    weight: NumberFormat, activation: NumberFormat | None, device: torch.device | str, group_size: int = 128
) -> Unit[LinearOperands]:
    """The unit that :func:`linear` runs on for a pair of formats on a device."""
    return LINEAR.pick(LinearOperands(weight, activation, torch.device(device), group_size))


def linear(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    block_size: Sequence[int],
    fmt: str,
    act_fmt: str | None,
    bias: Tensor | None,
) -> Tensor:
    """``x @ W^T + bias`` with ``W`` given by packed codes and scales, and ``x`` quantized token-wise to ``act_fmt``.

    Args:
        x: float ``(..., in_features)``.
        qdata: uint8 ``(out_features, in_features)`` codes; of at most 4 bits, two to a byte, the first in the low nibble.
        scale: ``(out_features or 1, groups)``.
        block_size: rows and columns of the weight that share a scale; -1 for a whole dimension.
        fmt: weight format.
        act_fmt: activation format; None multiplies ``x`` as it is.
        bias: ``(out_features,)`` or None.

    Returns:
        ``(..., out_features)`` in the type of ``x``.
    """
    weight, activation = parse(fmt), parse(act_fmt) if act_fmt else None
    group_size = x.shape[-1] if block_size[1] == -1 else block_size[1]
    unit = LINEAR.pick(LinearOperands(weight, activation, x.device, group_size))
    y: Tensor = unit.run(x, qdata, scale, block_size, weight, activation, bias)
    return y
