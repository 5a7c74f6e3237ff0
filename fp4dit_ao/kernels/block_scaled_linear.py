"""Linears in the hardware's block formats (MX, NVFP4): on Blackwell by torchao, elsewhere emulated on plain tensors.

The emulation converts operands to bfloat16 (bfloat16 input on GPUs) or float32. Their values need at most six bits, so both
types hold them exactly, and only the sum is rounded. Exported files contain the emulation.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4dit_ao.formats import FloatFormat, unpack
from fp4dit_ao.kernels.cuda.int8_linear import capability
from fp4dit_ao.kernels.units import Unit, UnitTable
from fp4dit_ao.ops import LIBRARY, dequantize, quantize
from fp4dit_ao.ops.block_scale import BLOCKS, choose_block_scale, four_over_six_scale, two_level_scale, unit

NATIVE = (10, 0)
"""Blackwell: the first capability with block-scaled instructions."""
_E2M1 = FloatFormat.parse("e2m1")


class BlockOperands(NamedTuple):
    """What decides how a linear in a block format is computed.

    Attributes:
        fmt: format of the elements.
        device: of weight and input.
        dtype: of the input.
        by_largest: whether scales of inputs follow from the largest magnitudes alone, as torchao finds them.
    """

    fmt: str
    device: torch.device
    dtype: torch.dtype
    by_largest: bool = True


class BlockWeight(Protocol):
    """A weight in a block format that computes its own linears.

    Attributes:
        by_largest: as in :class:`BlockOperands`.
    """

    by_largest: bool

    def on_torchao(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ W^T + bias`` on block-scaled instructions; ``x`` is bfloat16 or float32 and contiguous."""

    def emulated(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ W^T + bias`` in exact operands of a wider type."""


def _on_blackwell(x: Tensor, weight: BlockWeight, bias: Tensor | None) -> Tensor:
    taken = x if x.dtype in (torch.bfloat16, torch.float32) else x.bfloat16()
    return weight.on_torchao(taken.contiguous(), bias).to(x.dtype)


def _emulated(x: Tensor, weight: BlockWeight, bias: Tensor | None) -> Tensor:
    return weight.emulated(x, bias)


BLOCK_SCALED_LINEAR: UnitTable[BlockOperands] = UnitTable(
    "block_scaled_linear",
    [
        Unit(
            "block-scaled, Blackwell",
            lambda o: o.by_largest and o.fmt == "e2m1" and capability(o.device) >= NATIVE,
            _on_blackwell,
        ),  # torchao has no native product of MXFP6
        Unit(
            "block-scaled, emulated in bfloat16",
            lambda o: exact_type(o.device, o.dtype) == torch.bfloat16,
            _emulated,
            low_bit=False,
        ),
        Unit("block-scaled, emulated in float32", lambda o: True, _emulated, low_bit=False),
    ],
)


def linear(x: Tensor, weight: BlockWeight, bias: Tensor | None, fmt: str) -> Tensor:
    """``x @ W^T + bias`` with ``x`` quantized blockwise, ``(..., out_features)`` in the type of ``x``.

    Args:
        x: float ``(..., in_features)``.
        weight: ``(out_features, in_features)``.
        bias: ``(out_features,)`` or None.
        fmt: format of the weight's elements.
    """
    y: Tensor = BLOCK_SCALED_LINEAR.pick(BlockOperands(fmt, x.device, x.dtype, weight.by_largest)).run(x, weight, bias)
    return y


def mx_linear(x: Tensor, qdata: Tensor, scale: Tensor, fmt: str, bias: Tensor | None) -> Tensor:
    """``x @ W^T + bias`` with ``x`` quantized to the weight's MX format.

    Args:
        x: float ``(..., in_features)``.
        qdata: uint8 codes, E2M1 two to a byte, the first in the low nibble; MXFP6 one to a byte.
        scale: float8_e8m0fnu or its bytes, ``(out_features, in_features / 32)``.
        fmt: format of the elements.
        bias: ``(out_features,)`` or None.

    Returns:
        ``(..., out_features)`` in the type of ``x``.
    """
    dtype = exact_type(x.device, x.dtype)
    block = [1] * (x.ndim - 1) + [BLOCKS["e8m0"]]
    step = choose_block_scale(x, block, fmt, "e8m0")
    values = dequantize(quantize(x, block, step, fmt), block, step, fmt, dtype)
    return _product(x, values, torch.ops.fp4dit_ao.mx_dequantize(qdata, scale, fmt, dtype), None, bias)


def nvfp4_linear(x: Tensor, qdata: Tensor, scale: Tensor, per_tensor_scale: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ W^T + bias`` with ``x`` quantized to NVFP4.

    Args:
        x: float ``(..., in_features)``.
        qdata: uint8 E2M1 codes, two to a byte, the first in the low nibble.
        scale: float8_e4m3fn, ``(out_features, in_features / 16)``.
        per_tensor_scale: float32 scalar.
        bias: ``(out_features,)`` or None.

    Returns:
        ``(..., out_features)`` in the type of ``x``.
    """
    return _nvfp4_linear(two_level_scale, x, qdata, scale, per_tensor_scale, bias)


def four_over_six_linear(
    x: Tensor, qdata: Tensor, scale: Tensor, per_tensor_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """:func:`nvfp4_linear` with each block of ``x`` on the better of two scales (``ops.block_scale.four_over_six_scale``)."""
    return _nvfp4_linear(four_over_six_scale, x, qdata, scale, per_tensor_scale, bias)


def _nvfp4_linear(
    choose: Callable[[Tensor, list[int], str], tuple[Tensor, Tensor]],
    x: Tensor, qdata: Tensor, scale: Tensor, per_tensor_scale: Tensor, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    dtype, fmt = exact_type(x.device, x.dtype), str(_E2M1)
    block = [1] * (x.ndim - 1) + [BLOCKS["e4m3"]]
    steps, whole = choose(x, block, fmt)
    values = dequantize(quantize(x, block, steps * whole, fmt), block, steps, fmt, dtype)
    levels = dequantize(unpack(qdata, _E2M1.bits), [1, BLOCKS["e4m3"]], scale, fmt, dtype)
    return _product(x, values, levels, whole * per_tensor_scale * unit(_E2M1), bias)


def exact_type(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Type in which the emulation multiplies, for an input of ``dtype``."""
    return torch.bfloat16 if device.type == "cuda" and dtype == torch.bfloat16 else torch.float32


def _product(x: Tensor, values: Tensor, levels: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    y = F.linear(values, levels).float()
    y = y if scale is None else y * scale
    return (y if bias is None else y + bias.float()).to(x.dtype)


def mx_dequantize(qdata: Tensor, scale: Tensor, fmt: str, dtype: torch.dtype) -> Tensor:
    """An MX weight's values ``(out_features, in_features)``. An operator, since Inductor knows no E8M0 on CPUs."""
    lattice = FloatFormat.parse(fmt)
    steps = scale.view(torch.float8_e8m0fnu).float() * unit(lattice)
    return dequantize(unpack(qdata, lattice.bits), [1, BLOCKS["e8m0"]], steps, fmt, dtype)


LIBRARY.define("mx_dequantize(Tensor qdata, Tensor scale, str fmt, ScalarType dtype) -> Tensor")
LIBRARY.impl("mx_dequantize", mx_dequantize, "CompositeExplicitAutograd")
LIBRARY.impl(
    "mx_dequantize",
    lambda qdata, scale, fmt, dtype: qdata.new_empty(
        (qdata.shape[0], qdata.shape[1] * (2 if FloatFormat.parse(fmt).bits <= 4 else 1)), dtype=dtype
    ),
    "Meta",
)
