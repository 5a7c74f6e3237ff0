"""Observers for the hardware's block formats: every 32 or 16 elements along the last dimension share a low-bit scale."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torchao.quantization.granularity import PerGroup

from fp4dit_ao.config.scheme_rules import BLOCK_SEARCHES
from fp4dit_ao.formats import FloatFormat
from fp4dit_ao.observers.activation import ActivationObserver
from fp4dit_ao.observers.base import add_buffer
from fp4dit_ao.observers.four_over_six import four_over_six_scales
from fp4dit_ao.observers.weight import WeightObserver
from fp4dit_ao.ops.block_scale import BLOCKS, FOUR_OVER_SIX, choose_block_scale, two_level_scale

TWO_LEVEL_SEARCHES: dict[str, Callable[[Tensor, list[int], str], tuple[Tensor, Tensor]]] = {
    "absmax": two_level_scale,
    "four_over_six": four_over_six_scales,
}
"""How the scales of NVFP4's blocks and of the tensor are found, by ``QuantConfig.weight_search``."""
_OPS = torch.ops.fp4dit_ao


class BlockWeightObserver(WeightObserver):
    """A weight observer whose scales are E8M0 or two-level E4M3 numbers.

    Args:
        kind: type of the scales, a key of ``block_scales.BLOCKS``, which says how long a block is.

    Attributes:
        block_scale: float32 ``(out_features, blocks)``, each an E4M3 number, and
        tensor_scale: a float32 scalar: the factors of ``scale`` with ``"e4m3"``, set with it.
    """

    block_scale: Tensor | None
    tensor_scale: Tensor | None

    def __init__(
        self, fmt: str | FloatFormat | Sequence[str | FloatFormat], kind: str, name: str = "weight", **spec: Any
    ):
        super().__init__(fmt, PerGroup(BLOCKS[kind]), name=name, **spec)
        if self.search not in BLOCK_SEARCHES[kind]:
            raise ValueError(
                f"{name}: search={self.search!r}; {kind!r} blocks take {' or '.join(BLOCK_SEARCHES[kind])}"
            )
        self.kind = kind
        self.register_buffer("block_scale", None)
        self.register_buffer("tensor_scale", None)

    @property
    def factors(self) -> list[Tensor]:
        """What is stored of the scale: its two factors, or the powers of two themselves."""
        found = [x for x in (self.block_scale, self.tensor_scale) if x is not None]
        return found or [x for x in (self.scale,) if x is not None]

    def _search(self, weight: Tensor) -> Tensor:
        block_size, fmt = self.block_size(weight), str(self.fmt)
        if self.kind == "e8m0":
            return choose_block_scale(weight, block_size, fmt, self.kind)
        self.block_scale, self.tensor_scale = TWO_LEVEL_SEARCHES[self.search](weight, block_size, fmt)
        return self.block_scale * self.tensor_scale

    def _free_scale(self) -> Tensor | None:
        return None

    def pretend_observed(self, weight: Tensor) -> None:
        super().pretend_observed(weight)
        if self.kind != "e8m0":
            assert self.scale is not None
            self.block_scale, self.tensor_scale = torch.empty_like(self.scale), torch.empty(())

    def scale_node(self, model: GraphModule, weight: Tensor, scale: Tensor) -> Node:
        if self.kind == "e8m0":
            return super().scale_node(model, weight, scale)
        names = (f"{self.name}_scale", f"{self.name}_tensor_scale")
        buffers = [add_buffer(model, name, x) for name, x in zip(names, self.factors, strict=True)]
        return model.graph.call_function(torch.ops.aten.mul.Tensor, tuple(buffers))


class BlockActivationObserver(ActivationObserver):
    """Online quantization of every block of every token: nothing to calibrate.

    The tensor's scale of ``"e4m3"`` is online, too: it is the largest magnitude of the call, so that what else is in the
    batch moves the last bits.

    Args:
        kind: a kind of ``choose_block_scale``: of scales as in :class:`BlockWeightObserver`, and how they are found.
    """

    def __init__(
        self, fmt: str | FloatFormat, kind: str, name: str = "activation", collect_gram: bool = False, **spec: object
    ):
        super().__init__(fmt, name, collect_gram, **spec)
        self.kind = kind

    def block_size(self, x: Tensor) -> list[int]:
        return [1] * (x.ndim - 1) + [BLOCKS["e4m3" if self.kind == FOUR_OVER_SIX else self.kind]]

    def _fake_quantize(self, x: Tensor) -> Tensor:
        return self._quantize_dequantize(x, choose_block_scale(x, self.block_size(x), str(self.fmt), self.kind))

    def convert(self, model: GraphModule, observer_node: Node) -> None:
        self._quantize_online(model, observer_node, _OPS.choose_block_scale.default, self.kind)
