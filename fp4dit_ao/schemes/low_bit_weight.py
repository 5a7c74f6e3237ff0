"""A linear's weight in low bits, as the module form has it: from a float weight, or from the tensors that are stored of it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fp4dit_ao.config import QuantConfig
from fp4dit_ao.formats import parse
from fp4dit_ao.ops import full_block
from fp4dit_ao.ops.block_scale import BLOCKS, two_level_scale
from fp4dit_ao.passes.block_scaled_patterns import block_weight
from fp4dit_ao.quantizer import weight_observer
from fp4dit_ao.tensors.block_scaled import MXWeight, NVFP4Weight
from fp4dit_ao.tensors.minifloat import MinifloatTensor


@torch.no_grad()
def low_bit_weight(name: str, weight: Tensor, config: QuantConfig) -> Tensor:
    """Round ``weight`` to nearest, as a weight observer without a learned rounding does it.

    Args:
        name: of the linear, for messages.
        weight: float ``(out_features, in_features)``.
        config: of this linear.

    Raises:
        ValueError: NaN or Inf in it, or a group size that does not divide it.
    """
    observer = weight_observer(f"{name}.weight", config)()
    codes, scale = observer.quantized(weight.detach())
    block_size, fmt = observer.block_size(weight), str(observer.fmt)
    if config.activation_granularity == "block":
        scales = [scale] if config.scale_dtype == "e8m0" else list(two_level_scale(weight, block_size, fmt))
        return block_weight(codes, scales, fmt, weight.dtype)
    return MinifloatTensor.from_codes(codes, scale, block_size, fmt, _activation(config), weight.dtype)


def empty_parts(shape: Sequence[int], config: QuantConfig) -> dict[str, Tensor]:
    """What is stored of a weight of that shape, on the meta device, by the names of its tensors."""
    rows, columns = shape
    bits = parse(str(config.weight)).bits
    sizes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "qdata": ((rows, columns // 2 if bits <= 4 else columns), torch.uint8)
    }
    if config.activation_granularity == "block":
        sizes["scale"] = ((rows, columns // BLOCKS[config.scale_dtype]), _BLOCK_SCALES[config.scale_dtype])
        if config.scale_dtype == "e4m3":
            sizes["per_tensor_scale"] = ((), torch.float32)
    else:
        block = full_block(shape, block_size_of(config))
        sizes["scale"] = ((rows // block[0], columns // block[1]), getattr(torch, config.scale_dtype))
    return {name: torch.empty(size, dtype=dtype, device="meta") for name, (size, dtype) in sizes.items()}


def from_parts(parts: Mapping[str, Any], config: QuantConfig, dtype: torch.dtype) -> Tensor:
    """The weight that the tensors of :func:`empty_parts` are of, presenting itself as ``dtype``."""
    fmt = str(parse(str(config.weight)))
    if config.activation_granularity != "block":
        return MinifloatTensor(parts["qdata"], parts["scale"], block_size_of(config), fmt, _activation(config), dtype)
    if config.scale_dtype == "e4m3":
        return NVFP4Weight.from_parts(parts["qdata"], parts["scale"], parts["per_tensor_scale"], dtype)
    return MXWeight.from_parts(parts["qdata"], parts["scale"], fmt, dtype)


_BLOCK_SCALES = {"e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn}
"""What the scales of block formats are stored as."""


def _activation(config: QuantConfig) -> str | None:
    return None if config.activation is None else str(parse(config.activation))


def block_size_of(config: QuantConfig) -> list[int]:
    """How many rows and columns of a weight share a scale; -1 for all."""
    return {"group": [1, config.group_size], "channel": [1, -1], "tensor": [-1, -1]}[config.weight_granularity]
