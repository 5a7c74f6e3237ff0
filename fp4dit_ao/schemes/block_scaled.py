"""The hardware's block formats, MX and NVFP4: 32 or 16 elements share a low-bit scale, in weights and inputs alike.

Weights are torchao's ``MXTensor`` and ``NVFP4Tensor`` (``tensors.block_scaled``). Heads are too narrow for blocks, so q, k
and v are quantized token-wise where a config asks for it.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import GraphModule, Node

from fp4dit_ao.config import QuantConfig
from fp4dit_ao.config.scheme_rules import BLOCK_SCALED, SchemeRules
from fp4dit_ao.formats import FloatFormat, parse
from fp4dit_ao.kernels import block_scaled_linear
from fp4dit_ao.observers import BlockActivationObserver, BlockWeightObserver, TokenActivationObserver, WeightObserver
from fp4dit_ao.observers.activation import ActivationObserver
from fp4dit_ao.ops import quantize
from fp4dit_ao.ops.block_scale import BLOCKS, FOUR_OVER_SIX, unit
from fp4dit_ao.schemes.graph_patterns import block_wise_input, stored_weight
from fp4dit_ao.schemes.grouped import repeated
from fp4dit_ao.schemes.scheme import Arrays, Description, LowBitLinear, ObserverSpec, PlainLinear, describe_format
from fp4dit_ao.tensors.block_scaled import FourOverSixWeight, MXWeight, NVFP4Weight

_STORED = {"e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn}
"""torch's type of the stored scales, by ``QuantConfig.scale_dtype``."""
_NVFP4: dict[str, type[NVFP4Weight]] = {"e4m3": NVFP4Weight, FOUR_OVER_SIX: FourOverSixWeight}
"""The tensor class of NVFP4 weights, by how scales of inputs are found."""
_TENSOR_SCALE = "per_tensor_scale"
"""NVFP4's second scale, which MX does not have."""


class BlockScaledScheme:
    """See ``QuantizationScheme``. One tensor scale beside the blocks' makes it NVFP4, none makes it MX."""

    rules: SchemeRules = BLOCK_SCALED
    one_format = True

    def quantizes_online(self, config: QuantConfig) -> bool:
        return True

    def block_size(self, config: QuantConfig) -> list[int]:
        return [1, BLOCKS[config.scale_dtype]]

    def weight_observer(self, config: QuantConfig) -> ObserverSpec[WeightObserver]:
        arguments = {"fmt": (config.weight,), "kind": config.scale_dtype, "search": config.weight_search}
        return ObserverSpec(BlockWeightObserver, arguments)

    def input_observer(self, config: QuantConfig, fmt: str) -> ObserverSpec[ActivationObserver]:
        return ObserverSpec(BlockActivationObserver, {"fmt": fmt, "kind": _kind(config)})

    def attention_observer(self, config: QuantConfig, fmt: str) -> ObserverSpec[ActivationObserver]:
        return ObserverSpec(TokenActivationObserver, {"fmt": fmt})

    def empty_parts(self, shape: Sequence[int], config: QuantConfig) -> dict[str, Tensor]:
        rows, columns = shape
        packed = parse(str(config.weight)).bits <= 4
        sizes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "qdata": ((rows, columns // 2 if packed else columns), torch.uint8),
            "scale": ((rows, columns // BLOCKS[config.scale_dtype]), _STORED[config.scale_dtype]),
        }
        if _has_tensor_scale(config):
            sizes[_TENSOR_SCALE] = ((), torch.float32)
        return {name: torch.empty(size, dtype=dtype, device="meta") for name, (size, dtype) in sizes.items()}

    def from_parts(self, parts: Mapping[str, Tensor], config: QuantConfig, dtype: torch.dtype) -> Tensor:
        if _has_tensor_scale(config):
            return _NVFP4[_kind(config)].from_parts(parts["qdata"], parts["scale"], parts[_TENSOR_SCALE], dtype)
        return MXWeight.from_parts(parts["qdata"], parts["scale"], str(parse(str(config.weight))), dtype)

    @torch.no_grad()
    def round_to_nearest(self, name: str, weight: Tensor, config: QuantConfig) -> Tensor:
        observer = self.weight_observer(config).constructor(name=f"{name}.weight")()
        codes, _ = observer.quantized(weight.detach())
        return _from_codes(codes, observer.factors, str(observer.fmt), weight.dtype, _kind(config))

    def owns(self, weight: Tensor) -> bool:
        return isinstance(weight, MXWeight | NVFP4Weight)

    def nearest_codes(self, weight: Tensor, original: Tensor) -> Tensor:
        assert isinstance(weight, MXWeight | NVFP4Weight)
        step = weight.get_hp_scales() if isinstance(weight, NVFP4Weight) else weight.scale.float()
        step = step.reshape(weight.scale.shape) * unit(FloatFormat.parse(weight.fmt))
        return quantize(original, [1, original.shape[1] // step.shape[1]], step, weight.fmt)

    def lowered(self, model: GraphModule, linear: Node) -> LowBitLinear | None:
        found, stored = block_wise_input(linear.args[0]), stored_weight(model, linear.args[1])
        if found is None or stored is None:
            return None
        weight = _from_codes(stored.codes, stored.scales, stored.fmt, stored.dtype, str(found.kind))
        return LowBitLinear(found.source, weight, stored.path)

    def plain_linear(self, weight: Tensor) -> PlainLinear:
        if isinstance(weight, NVFP4Weight):
            parts = {"qdata": weight.qdata, "scale": weight.scale, _TENSOR_SCALE: weight.per_tensor_scale}
            by_largest = block_scaled_linear.nvfp4_linear
            return PlainLinear(by_largest if weight.by_largest else block_scaled_linear.four_over_six_linear, parts)
        assert isinstance(weight, MXWeight)
        parts = {"qdata": weight.qdata, "scale": weight.scale.view(torch.uint8)}  # archives have no E8M0
        return PlainLinear(block_scaled_linear.mx_linear, parts, (weight.fmt,))

    def describe(self, config: QuantConfig) -> dict[str, object]:
        fmt = FloatFormat.parse(str(config.weight))
        return {"weight": str(fmt), "block_size": self.block_size(config), "unit": unit(fmt)}

    def describe_format(self, config: QuantConfig) -> dict[str, object]:
        return describe_format(str(config.weight))

    def input_scale(self, config: QuantConfig, attention: bool) -> str:
        if attention:
            return "token"
        return "block" if config.activation_search == "absmax" else f"block, {config.activation_search}"

    def dequantize(
        self, codes: NDArray[np.uint8], parts: Arrays, layer: Description, fmt: Description
    ) -> NDArray[np.float32]:
        whole = parts.get(_TENSOR_SCALE, np.float32(1))
        scale = parts["scale"] * whole * np.float32(layer["unit"])
        weight: NDArray[np.float32] = np.array(fmt["levels"], np.float32)[codes] * repeated(scale, codes.shape)
        return weight


def _has_tensor_scale(config: QuantConfig) -> bool:
    return config.scale_dtype == "e4m3"


def _kind(config: QuantConfig) -> str:
    """How scales of inputs are found, a kind of ``ops.choose_block_scale``."""
    return config.scale_dtype if config.activation_search == "absmax" else FOUR_OVER_SIX


def _from_codes(codes: Tensor, factors: list[Tensor], fmt: str, dtype: torch.dtype, kind: str) -> Tensor:
    """NVFP4 from the factors of ``two_level_scale``, MX from one step; inputs have scales of ``kind``."""
    if len(factors) == 2:
        blocks, whole = factors
        return _NVFP4[kind].from_codes(codes, blocks, whole, dtype)
    (step,) = factors
    return MXWeight.from_codes(codes, step, fmt, dtype)
