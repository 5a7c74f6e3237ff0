"""The grouped scheme (FP4DiT): levels of a number format times one float scale for each group, channel or tensor.

Weights are ``MinifloatTensor``; inputs are quantized token-wise and online, or in one static range.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import GraphModule, Node
from torchao.quantization.granularity import Granularity, PerAxis, PerGroup, PerTensor

from fp4dit_ao import kernels
from fp4dit_ao.config import QuantConfig
from fp4dit_ao.config.scheme_rules import GROUPED, SchemeRules
from fp4dit_ao.formats import parse
from fp4dit_ao.observers import StaticActivationObserver, TokenActivationObserver, WeightObserver
from fp4dit_ao.observers.activation import ActivationObserver
from fp4dit_ao.observers.static_search import SearchedActivationObserver
from fp4dit_ao.ops import full_block, quantize
from fp4dit_ao.schemes.graph_patterns import block_wise_input, stored_weight, token_wise_input
from fp4dit_ao.schemes.scheme import Arrays, Description, LowBitLinear, ObserverSpec, PlainLinear, describe_format
from fp4dit_ao.tensors.minifloat import MinifloatTensor

INPUTS: dict[str, type[ActivationObserver]] = {"token": TokenActivationObserver, "tensor": StaticActivationObserver}
"""Observers by ``QuantConfig.activation_granularity``."""


class GroupedScheme:
    """See ``QuantizationScheme``."""

    rules: SchemeRules = GROUPED
    one_format = False

    def quantizes_online(self, config: QuantConfig) -> bool:
        return config.activation_granularity == "token"

    def block_size(self, config: QuantConfig) -> list[int]:
        return {"group": [1, config.group_size], "channel": [1, -1], "tensor": [-1, -1]}[config.weight_granularity]

    def weight_observer(self, config: QuantConfig) -> ObserverSpec[WeightObserver]:
        granularities: dict[str, Granularity] = {
            "group": PerGroup(config.group_size), "channel": PerAxis(0), "tensor": PerTensor(),
        }  # fmt: skip
        arguments = {
            "fmt": config.weight_candidates or (config.weight,),
            "granularity": granularities[config.weight_granularity],
            "search": config.weight_search,
            "scale_dtype": getattr(torch, config.scale_dtype),
        }
        return ObserverSpec(WeightObserver, arguments)

    def input_observer(self, config: QuantConfig, fmt: str) -> ObserverSpec[ActivationObserver]:
        candidates = config.activation_candidates
        return activation_observer(config, candidates if fmt in candidates else fmt)

    def attention_observer(self, config: QuantConfig, fmt: str) -> ObserverSpec[ActivationObserver]:
        return activation_observer(config, fmt)

    def empty_parts(self, shape: Sequence[int], config: QuantConfig) -> dict[str, Tensor]:
        rows, columns = shape
        block = full_block(shape, self.block_size(config))
        packed = parse(str(config.weight)).bits <= 4
        return {
            "qdata": torch.empty((rows, columns // 2 if packed else columns), dtype=torch.uint8, device="meta"),
            "scale": torch.empty(
                (rows // block[0], columns // block[1]), dtype=getattr(torch, config.scale_dtype), device="meta"
            ),
        }

    def from_parts(self, parts: Mapping[str, Tensor], config: QuantConfig, dtype: torch.dtype) -> Tensor:
        fmt, act_fmt = str(parse(str(config.weight))), canonical(config.activation)
        return MinifloatTensor(parts["qdata"], parts["scale"], self.block_size(config), fmt, act_fmt, dtype)

    @torch.no_grad()
    def round_to_nearest(self, name: str, weight: Tensor, config: QuantConfig) -> Tensor:
        observer = self.weight_observer(config).constructor(name=f"{name}.weight")()
        codes, scale = observer.quantized(weight.detach())
        block_size, fmt = observer.block_size(weight), str(observer.fmt)
        return MinifloatTensor.from_codes(codes, scale, block_size, fmt, canonical(config.activation), weight.dtype)

    def owns(self, weight: Tensor) -> bool:
        return isinstance(weight, MinifloatTensor)

    def nearest_codes(self, weight: Tensor, original: Tensor) -> Tensor:
        assert isinstance(weight, MinifloatTensor)
        return quantize(original, weight.block_size, weight.scale, weight.fmt)

    def lowered(self, model: GraphModule, linear: Node) -> LowBitLinear | None:
        stored = stored_weight(model, linear.args[1])
        if stored is None or len(stored.scales) != 1 or block_wise_input(linear.args[0]) is not None:
            return None
        found = token_wise_input(linear.args[0])
        weight = MinifloatTensor.from_codes(
            stored.codes, stored.scales[0], stored.block_size, stored.fmt, found.fmt if found else None, stored.dtype
        )
        x = linear.args[0] if found is None else found.source
        assert isinstance(x, Node)
        return LowBitLinear(x, weight, stored.path)

    def plain_linear(self, weight: Tensor) -> PlainLinear:
        assert isinstance(weight, MinifloatTensor)
        parts = {"qdata": weight.qdata, "scale": weight.scale}
        return PlainLinear(kernels.linear, parts, (weight.block_size, weight.fmt, weight.act_fmt))

    def describe(self, config: QuantConfig) -> dict[str, object]:
        return {"weight": str(parse(str(config.weight))), "block_size": self.block_size(config)}

    def describe_format(self, config: QuantConfig) -> dict[str, object]:
        return describe_format(str(config.weight))

    def input_scale(self, config: QuantConfig, attention: bool) -> str:
        return config.activation_granularity

    def dequantize(
        self, codes: NDArray[np.uint8], parts: Arrays, layer: Description, fmt: Description
    ) -> NDArray[np.float32]:
        levels = np.array(fmt["levels"], np.float32)
        weight: NDArray[np.float32] = levels[codes] * repeated(parts["scale"].astype(np.float32), codes.shape)
        return weight


def activation_observer(config: QuantConfig, fmt: str | tuple[str, ...]) -> ObserverSpec[ActivationObserver]:
    """The observer of a tensor with one scale a token or one static range, in a format or one of several."""
    searched = config.activation_search != "absmax"
    return ObserverSpec(SearchedActivationObserver if searched else INPUTS[config.activation_granularity], {"fmt": fmt})


def repeated(scale: NDArray[np.float32], shape: Sequence[int]) -> NDArray[np.float32]:
    """``scale``, one a block, for every element of a weight of ``shape``."""
    rows, columns = shape[0] // scale.shape[0], shape[1] // scale.shape[1]
    return scale.repeat(rows, 0).repeat(columns, 1)


def canonical(fmt: str | None) -> str | None:
    """A number format's name as ``str`` gives it; ``"e0m3"`` for ``"int4"``."""
    return None if fmt is None else str(parse(fmt))
