"""Trades memory for speed: turns packed codes into one byte per weight."""

from typing import TypeVar

from torch import nn

from fp4dit_ao import _compat
from fp4dit_ao.tensors.codebook import CodebookTensor
from fp4dit_ao.tensors.levels import LevelTensor
from fp4dit_ao.tensors.minifloat import MinifloatTensor

Module = TypeVar("Module", bound=nn.Module)


def unpack_weights(model: Module, to: str = "int8") -> Module:
    """Unpacks every packed weight whose input is quantized to bytes, in place; no value changes.

    N weights take N bytes instead of N / 2 (scales stay). Results of ``"int8"`` differ from those of packed weights
    only by the order of sums. ``"fp8"`` runs on FP8 tensor cores; Hopper's accumulate with about 14 bits.

    Args:
        model: a lowered graph, or a quantized pipeline's transformer. Save it before: unpacked weights cannot be saved.
        to: ``"int8"`` or ``"fp8"``.

    Returns:
        ``model``.

    Raises:
        ValueError: no weight can be unpacked, or the type cannot hold the levels of one exactly; the message names it.
    """
    found: dict[tuple[nn.Module, str], LevelTensor] = {}
    for path, owner in model.named_modules():
        for name, parameter in _compat.slots(owner)[0].items():
            weight = None if parameter is None else parameter.detach()
            if isinstance(weight, MinifloatTensor | CodebookTensor) and weight.act_fmt is not None:
                try:
                    found[owner, name] = LevelTensor.from_packed(weight, to)
                except ValueError as error:
                    raise ValueError(f"{path}.{name}: {error}") from None
    if not found:
        raise ValueError(
            "no packed weight to unpack: weights of block formats (nvfp4, mxfp4, …) stay as they are, and those of a graph are "
            "packed by lower(converted), with a recipe that quantizes inputs"
        )
    for (owner, name), weight in found.items():
        _compat.slots(owner)[0][name] = nn.Parameter(weight, requires_grad=False)
    return model
