"""``torch.ops.fp4dit_ao.level_linear``: linears whose weights are stored as a byte a level, for units that multiply bytes."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4dit_ao import _compat
from fp4dit_ao.kernels import flop_counts, int8_linear
from fp4dit_ao.kernels.cuda import int8_linear as triton_linear
from fp4dit_ao.kernels.units import Unit, UnitTable
from fp4dit_ao.ops import LIBRARY

_FP8 = torch.float8_e4m3fn
_MULTIPLE = 16
"""Sizes of matrices that the FP8 product takes are multiples of this."""


class LevelOperands(NamedTuple):
    """What decides how a linear of levels is computed.

    Attributes:
        levels: type of the stored levels and of the tokens, int8 or float8_e4m3fn.
        device: of both.
        shape: (out_features, in_features).
        groups: scales of a row.
    """

    levels: torch.dtype
    device: torch.device
    shape: tuple[int, int]
    groups: int


def _fp8_units(o: LevelOperands) -> bool:
    return o.levels == _FP8 and triton_linear.capability(o.device) >= triton_linear.FP8_CAPABILITY


def _row_wise_fp8(o: LevelOperands) -> bool:
    aligned = all(size % _MULTIPLE == 0 for size in o.shape)
    return _fp8_units(o) and o.groups == 1 and aligned


def _triton(o: LevelOperands) -> bool:
    return o.groups > 1 and triton_linear.supports(o.device, 4, o.shape[1] // o.groups)


def _on_scaled_mm(
    tokens: Tensor, token_scale: Tensor, levels: Tensor, scale: Tensor, bias: Tensor | None, output_dtype: torch.dtype
) -> Tensor:
    columns = scale.float().expand(levels.shape[0], 1).reshape(1, -1)
    inside = bias if bias is not None and bias.dtype == torch.bfloat16 else None
    y = _compat.fp8_product(tokens.contiguous(), levels.T, token_scale, columns, torch.bfloat16, inside, fast=True)
    return (y if bias is None or inside is not None else y + bias).to(output_dtype)


def _on_triton(
    tokens: Tensor, token_scale: Tensor, levels: Tensor, scale: Tensor, bias: Tensor | None, output_dtype: torch.dtype
) -> Tensor:
    from fp4dit_ao.kernels.cuda import triton_linear

    return triton_linear.run(tokens, token_scale, levels, scale, None, bias, output_dtype)


def _on_int8_operators(
    tokens: Tensor, token_scale: Tensor, levels: Tensor, scale: Tensor, bias: Tensor | None, output_dtype: torch.dtype
) -> Tensor:
    y = int8_linear.group_products(tokens, levels, scale) * token_scale
    return (y if bias is None else y + bias.float()).to(output_dtype)


def _on_float_operators(
    tokens: Tensor, token_scale: Tensor, levels: Tensor, scale: Tensor, bias: Tensor | None, output_dtype: torch.dtype
) -> Tensor:
    """float32 holds integers up to 2^24 exactly, and so each product and the sum of a group."""
    groups = scale.shape[1]
    parts = zip(tokens.float().chunk(groups, 1), levels.float().chunk(groups, 1), scale.float().T, strict=True)
    y = torch.zeros((), dtype=torch.float32, device=tokens.device)
    for x, w, s in parts:
        y = y + F.linear(x, w) * s
    y = y * token_scale
    return (y if bias is None else y + bias.float()).to(output_dtype)


LEVEL_LINEAR: UnitTable[LevelOperands] = UnitTable(
    "level_linear",
    [
        Unit("FP8, row-wise scaled product", _row_wise_fp8, _on_scaled_mm),
        Unit("int8, Triton", lambda o: o.levels == torch.int8 and _triton(o), _on_triton),
        Unit("FP8, Triton", lambda o: _fp8_units(o) and _triton(o), _on_triton),
        Unit("int8, PyTorch operators", lambda o: o.levels == torch.int8, _on_int8_operators),
        Unit("float32, FP8 levels widened", lambda o: True, _on_float_operators, low_bit=False),
    ],
)


def operands(levels: Tensor, scale: Tensor, device: torch.device) -> LevelOperands:
    """What :data:`LEVEL_LINEAR` asks of a weight on a device."""
    return LevelOperands(levels.dtype, device, (levels.shape[0], levels.shape[1]), scale.shape[1])


def level_linear(
    tokens: Tensor, token_scale: Tensor, levels: Tensor, scale: Tensor, bias: Tensor | None, output_dtype: torch.dtype
) -> Tensor:
    """``(tokens @ levels^T, group by group times scale) * token_scale + bias``, ``(rows, out_features)``.

    int8 is exact up to the float32 sum of groups. float8_e4m3fn is, too, where the sum is kept in full float32 (CPUs); Hopper's
    tensor cores keep about 14 bits of it.

    Args:
        tokens: int8 or float8_e4m3fn ``(rows, in_features)``.
        token_scale: float32 ``(rows, 1)``.
        levels: of the tokens' type, ``(out_features, in_features)``.
        scale: float ``(out_features or 1, groups)``.
        bias: ``(out_features,)`` or None.
        output_dtype: float32, bfloat16 or float16.
    """
    unit = LEVEL_LINEAR.pick(operands(levels, scale, tokens.device))
    y: Tensor = unit.run(tokens, token_scale, levels, scale, bias, output_dtype)
    return y


LIBRARY.define(
    "level_linear(Tensor tokens, Tensor token_scale, Tensor levels, Tensor scale, Tensor? bias, ScalarType output_dtype) "
    "-> Tensor",
    tags=(torch.Tag.flexible_layout,),
)
LIBRARY.impl("level_linear", level_linear, "CPU")
LIBRARY.impl("level_linear", level_linear, "CUDA")
LIBRARY.impl(
    "level_linear",
    lambda tokens, token_scale, levels, scale, bias, output_dtype: tokens.new_empty(
        (tokens.shape[0], levels.shape[0]), dtype=output_dtype
    ),
    "Meta",
)
flop_counts.register("level_linear", flop_counts.linear)
