"""Linears in the hardware's block formats on hardware that has none of them: plain tensors in, plain operators.

Operands become bfloat16 on GPUs and float32 on CPUs. Their values need at most six bits, so both types hold them exactly, and
only the sum is rounded. What :mod:`fp4dit_ao.tensors.block_scaled` and exported files compute.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4dit_ao.formats import FloatFormat, unpack
from fp4dit_ao.ops import LIBRARY, dequantize, quantize
from fp4dit_ao.ops.block_scale import BLOCKS, choose_block_scale, two_level_scale, unit

_E2M1 = FloatFormat.parse("e2m1")


def mx_linear(x: Tensor, qdata: Tensor, scale: Tensor, fmt: str, bias: Tensor | None) -> Tensor:
    """``x @ W^T + bias`` with ``x`` quantized to the weight's MX format.

    Args:
        x: float ``(..., in_features)``.
        qdata: uint8 codes, E2M1 two to a byte, the first in the low nibble; MXFP6 one to a byte.
        scale: float8_e8m0fnu or its bytes, ``(out_features, in_features / 32)``.
        fmt: of the elements.
        bias: ``(out_features,)`` or None.

    Returns:
        ``(..., out_features)`` in the type of ``x``.
    """
    dtype = _exact_type(x)
    block = [1] * (x.ndim - 1) + [BLOCKS["e8m0"]]
    step = choose_block_scale(x, block, fmt, "e8m0")
    values = dequantize(quantize(x, block, step, fmt), block, step, fmt, dtype)
    return _sum(x, values, torch.ops.fp4dit_ao.mx_dequantize(qdata, scale, fmt, dtype), None, bias)


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
    dtype, fmt = _exact_type(x), str(_E2M1)
    block = [1] * (x.ndim - 1) + [BLOCKS["e4m3"]]
    steps, whole = two_level_scale(x, block, fmt)
    values = dequantize(quantize(x, block, steps * whole, fmt), block, steps, fmt, dtype)
    levels = dequantize(unpack(qdata, _E2M1.bits), [1, BLOCKS["e4m3"]], scale, fmt, dtype)
    return _sum(x, values, levels, whole * per_tensor_scale * unit(_E2M1), bias)


def _exact_type(x: Tensor) -> torch.dtype:
    return torch.bfloat16 if x.is_cuda and x.dtype == torch.bfloat16 else torch.float32


def _sum(x: Tensor, values: Tensor, levels: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
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
