"""Nodes of a converted graph that stand for quantized values: what the schemes look for when a graph is lowered."""

from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fp4dit_ao._compat import Arguments, Operator

_OPS = torch.ops.fp4dit_ao
_MUL = torch.ops.aten.mul.Tensor
CODES = "_codes"
"""Suffix of the buffer that holds a weight's codes, after the weight's own name."""


@dataclass(frozen=True)
class QuantizedInput:
    """A value that is quantized online and dequantized again.

    Attributes:
        source: the float value.
        fmt: name of the format.
        kind: type of the scale, or how it is found (``ops.choose_scale``, ``ops.choose_block_scale``).
    """

    source: Node
    fmt: str
    kind: object = torch.float32


@dataclass(frozen=True)
class StoredWeight:
    """A weight that ``fp4dit_ao.dequantize`` makes of buffers.

    Attributes:
        path: fully qualified name of the float weight that the buffers stand for.
        codes: uint8 ``(out_features, in_features)``.
        scales: one buffer, or the factors that are multiplied to the scale.
        block_size: rows and columns that share a scale; -1 for all.
        fmt: name of the format.
        dtype: of the dequantized weight.
    """

    path: str
    codes: Tensor
    scales: list[Tensor]
    block_size: list[int]
    fmt: str
    dtype: torch.dtype


def token_wise_input(node: object) -> QuantizedInput | None:
    """The value behind ``node`` if that is ``dequantize(quantize(x))`` with a scale chosen for each token, else None."""
    found = _online_input(node, _OPS.choose_scale.default)
    if found is None:
        return None
    x, block_size = found
    return x if block_size[-1] == -1 and all(size == 1 for size in block_size[:-1]) else None


def block_wise_input(node: object) -> QuantizedInput | None:
    """The value behind ``node`` if that is ``dequantize(quantize(x))`` with a scale chosen for each block, else None."""
    found = _online_input(node, _OPS.choose_block_scale.default)
    return None if found is None else found[0]


def stored_weight(model: GraphModule, node: object) -> StoredWeight | None:
    """The buffers behind ``node`` if that dequantizes codes and scales that are stored, else None."""
    if not is_call(node, _OPS.dequantize.default):
        return None
    arguments: Arguments = node.args
    codes, block_size, scale, fmt, dtype = arguments
    parts: Arguments = scale.args if is_call(scale, _MUL) else (scale,)
    if not all(is_buffer(part) for part in (codes, *parts)):
        return None
    return StoredWeight(
        weight_path(codes),
        tensor_of(model, codes),
        [tensor_of(model, part) for part in parts],
        list(block_size),
        fmt,
        dtype,
    )


def _online_input(node: object, choose: Operator) -> tuple[QuantizedInput, list[int]] | None:
    """What is quantized online with a scale that ``choose`` chooses, and the block size that it is chosen for."""
    if not is_call(node, _OPS.dequantize.default):
        return None
    arguments: Arguments = node.args
    codes, _, scale, fmt, _ = arguments
    if not (is_call(scale, choose) and is_call(codes, _OPS.quantize.default)):
        return None
    of_scale: Arguments = scale.args
    x, block_size, _, kind = of_scale
    return (QuantizedInput(x, str(fmt), kind), list(block_size)) if isinstance(x, Node) and codes.args[0] is x else None


def is_call(node: object, target: Operator) -> TypeGuard[Node]:
    """Whether ``node`` calls the operator ``target``."""
    return isinstance(node, Node) and node.target is target


def is_buffer(node: object) -> TypeGuard[Node]:
    """Whether ``node`` reads a parameter or buffer."""
    return isinstance(node, Node) and node.op == "get_attr"


def weight_path(codes: Node) -> str:
    """Name of the weight whose codes the buffer node ``codes`` reads."""
    return str(codes.target).removesuffix(CODES)


def tensor_of(model: nn.Module, node: Node) -> Tensor:
    """The tensor that a ``get_attr`` node reads."""
    parent, _, leaf = str(node.target).rpartition(".")
    value = getattr(model.get_submodule(parent), leaf)
    assert isinstance(value, Tensor)
    return value
