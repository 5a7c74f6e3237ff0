"""Linears whose operands are in one block format of the hardware: which they are, and torchao's tensor for their weight."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fp4dit_ao.tensors.block_scaled import MXWeight, NVFP4Weight

_OPS = torch.ops.fp4dit_ao
_MUL = torch.ops.aten.mul.Tensor


def block_input(node: Any) -> tuple[Node, str] | None:
    """(x, format) if ``node`` is the block-wise quantized and dequantized ``x``."""
    if not isinstance(node, Node) or node.target is not _OPS.dequantize.default:
        return None
    codes, _, scale, fmt, _ = node.args
    if not (isinstance(scale, Node) and scale.target is _OPS.choose_block_scale.default):
        return None
    if not (isinstance(codes, Node) and codes.target is _OPS.quantize.default):
        return None
    x = scale.args[0]
    return (x, str(fmt)) if isinstance(x, Node) and codes.args[0] is x else None


def stored_scales(node: Any) -> list[Node]:
    """The buffers that a stored weight's scale is made of: one, or NVFP4's two; none if it is computed otherwise."""
    if not isinstance(node, Node):
        return []
    parts = node.args if node.target is _MUL else (node,)
    return [part for part in parts if isinstance(part, Node)] if all(_is_buffer(part) for part in parts) else []


def block_weight(codes: Tensor, scales: list[Tensor], fmt: str, dtype: torch.dtype) -> Tensor:
    """The weight as torchao's tensor: NVFP4 of two scales, MX of one."""
    if len(scales) == 2:
        blocks, whole = scales
        return NVFP4Weight.from_codes(codes, blocks, whole, dtype)
    (step,) = scales
    return MXWeight.from_codes(codes, step, fmt, dtype)


def _is_buffer(node: Any) -> bool:
    return isinstance(node, Node) and node.op == "get_attr"
