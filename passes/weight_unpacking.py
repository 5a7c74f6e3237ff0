"""Memory or speed: packed codes, or a byte a level."""

from typing import TypeVar

from torch import nn

from fp4dit_ao import _compat
from fp4dit_ao.tensors.levels import LevelTensor
from fp4dit_ao.tensors.minifloat import MinifloatTensor

Module = TypeVar("Module", bound=nn.Module)


def unpack_weights(model: Module, to: str = "int8") -> Module:
    """Turn every packed weight whose input is quantized into bytes, in place; no value changes.

    A weight of N levels takes N bytes instead of N / 2 (its scales stay). ``"int8"`` computes what packed weights do, to the
    last bit but for the order of sums. ``"fp8"`` runs on FP8 tensor cores, of which Hopper's add up with about 14 bits.

    Args:
        model: a lowered graph, or a quantized pipeline's transformer. Save it before: bytes are not saved.
        to: ``"int8"`` or ``"fp8"``.

    Returns:
        ``model``.

    Raises:
        ValueError: no weight can be unpacked, or one has levels that the type does not hold exactly (which one is said).
    """
    found: dict[tuple[nn.Module, str], LevelTensor] = {}
    for path, owner in model.named_modules():
        for name, parameter in _compat.slots(owner)[0].items():
            weight = None if parameter is None else parameter.detach()
            if isinstance(weight, MinifloatTensor) and weight.act_fmt is not None:
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
