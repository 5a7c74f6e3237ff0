"""Observers for the hardware's block formats: every 32 or 16 elements along the last dimension share a low-bit scale."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torchao.quantization.granularity import PerGroup

from fp4dit_ao.formats import FloatFormat
from fp4dit_ao.observers.activation import ActivationObserver
from fp4dit_ao.observers.base import add_buffer
from fp4dit_ao.observers.weight import WeightObserver
from fp4dit_ao.ops.block_scale import BLOCKS, choose_block_scale, two_level_scale

_OPS = torch.ops.fp4dit_ao


class BlockWeightObserver(WeightObserver):
    """A weight observer whose scales are E8M0 or two-level E4M3 numbers.

    Args:
        kind: type of the scales, a key of ``block_scales.BLOCKS``, which says how long a block is.
    """

    def __init__(
        self, fmt: str | FloatFormat | Sequence[str | FloatFormat], kind: str, name: str = "weight", **spec: Any
    ):
        super().__init__(fmt, PerGroup(BLOCKS[kind]), name=name, **spec)
        self.kind = kind

    def _search(self, weight: Tensor) -> Tensor:
        return choose_block_scale(weight, self.block_size(weight), str(self.fmt), self.kind)

    def _free_scale(self) -> Tensor | None:
        return None

    def scale_node(self, model: GraphModule, weight: Tensor, scale: Tensor) -> Node:
        if self.kind == "e8m0":
            return super().scale_node(model, weight, scale)
        blocks, tensor = two_level_scale(weight, self.block_size(weight), str(self.fmt))
        buffers = (
            add_buffer(model, f"{self.name}_scale", blocks),
            add_buffer(model, f"{self.name}_tensor_scale", tensor),
        )
        return model.graph.call_function(torch.ops.aten.mul.Tensor, buffers)


class BlockActivationObserver(ActivationObserver):
    """Online quantization of every block of every token: nothing to calibrate.

    The tensor's scale of ``"e4m3"`` is online, too: it is the largest magnitude of the call, so that what else is in the
    batch moves the last bits.

    Args:
        kind: as in :class:`BlockWeightObserver`.
    """

    def __init__(
        self, fmt: str | FloatFormat, kind: str, name: str = "activation", collect_gram: bool = False, **spec: object
    ):
        super().__init__(fmt, name, collect_gram, **spec)
        self.kind = kind

    def block_size(self, x: Tensor) -> list[int]:
        return [1] * (x.ndim - 1) + [BLOCKS[self.kind]]

    def _fake_quantize(self, x: Tensor) -> Tensor:
        return self._quantize_dequantize(x, choose_block_scale(x, self.block_size(x), str(self.fmt), self.kind))

    def convert(self, model: GraphModule, observer_node: Node) -> None:
        self._quantize_online(model, observer_node, _OPS.choose_block_scale.default, self.kind)
