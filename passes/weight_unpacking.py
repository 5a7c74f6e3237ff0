"""Trades memory for speed: turns packed codes into one byte per weight, or back into floats where these are faster."""

from collections.abc import Collection
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.utils import TorchAOBaseTensor

from fp4dit_ao import _compat
from fp4dit_ao.tensors.codebook import CodebookTensor
from fp4dit_ao.tensors.levels import TYPES, LevelTensor
from fp4dit_ao.tensors.minifloat import MinifloatTensor
from fp4dit_ao.util.plain_mode import plain_mode

Module = TypeVar("Module", bound=nn.Module)
BFLOAT16 = "bfloat16"
_UNPACKED = "fp4dit_ao_unpacked"
"""Attribute of modules one of whose weights was unpacked, and key of a graph's ``meta`` with the number of times that some
were."""


@plain_mode()
def unpack_weights(model: Module, to: str = "int8", layers: Collection[str] | None = None) -> Module:
    """Unpacks packed weights in place: to a byte each, which changes no value, or to bfloat16.

    N weights take N bytes instead of N / 2 (scales stay). Results of ``"int8"`` differ from those of packed weights
    only by the order of sums. ``"fp8"`` runs on FP8 tensor cores; Hopper's accumulate with about 14 bits.

    ``"bfloat16"`` is for layers where it is faster (``fp4dit-ao inspect`` measures which). The weights are rounded to bfloat16
    and take four times their packed size; tokens that the linear itself would quantize stay as they are.

    Args:
        model: a lowered graph, or a quantized pipeline's transformer. Save it before: unpacked weights cannot be saved.
        to: ``"int8"`` or ``"fp8"``, for weights whose input is quantized and that have no block format; or ``"bfloat16"``, for
            all of a model that runs in bfloat16.
        layers: names of the linears to unpack; all that can be if None.

    Returns:
        ``model``.

    Raises:
        ValueError: no weight can be unpacked, one of ``layers`` has none to unpack, or the type cannot hold one; the message
            names it.
    """
    if to not in (*TYPES, BFLOAT16):
        raise ValueError(f"weights can be unpacked to {', '.join(TYPES)} or {BFLOAT16}, not to {to!r}")
    found: dict[tuple[nn.Module, str], Tensor] = {}
    paths: set[str] = set()
    for path, owner in model.named_modules():
        for name, parameter in _compat.slots(owner)[0].items():
            if parameter is None or (layers is not None and _without_graph(path) not in layers):
                continue
            try:
                weight = _unpacked(parameter.detach(), to)
            except ValueError as error:
                raise ValueError(f"{path}.{name}: {error}") from None
            if weight is not None:
                found[owner, name] = weight
                paths.add(_without_graph(path))
    if layers is not None and (missing := sorted(set(layers) - paths)):
        raise ValueError(f"{missing[0]} has no packed weight to unpack to {to} ({len(missing)} such layers)")
    if not found and layers is None:
        raise ValueError(
            "no packed weight to unpack: weights of block formats (nvfp4, mxfp4, …) stay as they are, and those of a graph are "
            "packed by lower(converted), with a recipe that quantizes inputs"
        )
    for (owner, name), value in found.items():
        _compat.slots(owner)[0][name] = nn.Parameter(value, requires_grad=False)
        setattr(owner, _UNPACKED, True)
    for graph in model.modules():
        if isinstance(graph, GraphModule):
            graph.meta[_UNPACKED] = times_unpacked(graph) + 1
    return model


def times_unpacked(graph: GraphModule) -> int:
    """How often weights of ``graph`` were unpacked; what was compiled before holds others."""
    count: int = graph.meta.get(_UNPACKED, 0)
    return count


def refuse_unpacked(model: nn.Module, what: str) -> None:
    """Raise ``ValueError`` if a weight of ``model`` was unpacked: graphs are rebuilt from packed codes alone."""
    graphs = (module for module in model.modules() if isinstance(module, GraphModule))
    if any(getattr(module, _UNPACKED, False) for module in model.modules()) or any(map(times_unpacked, graphs)):
        raise ValueError(f"{what} needs packed weights, and these were unpacked; do it before unpack_weights()")


def _unpacked(weight: Tensor, to: str) -> Tensor | None:
    """A packed weight in another form; None for weights that have none."""
    if to == BFLOAT16:
        return _in_bfloat16(weight) if isinstance(weight, TorchAOBaseTensor) else None
    if isinstance(weight, MinifloatTensor | CodebookTensor) and weight.act_fmt is not None:
        return LevelTensor.from_packed(weight, to)
    return None


def _in_bfloat16(weight: TorchAOBaseTensor) -> Tensor:
    if weight.dtype != torch.bfloat16:
        raise ValueError(
            f"the model runs in {weight.dtype}, and bfloat16 is less exact; cast it first: .to(torch.bfloat16)"
        )
    values: Tensor = weight.dequantize(torch.bfloat16)
    return values.contiguous()


def _without_graph(path: str) -> str:
    """A linear's name in the model, which the graph form holds as its submodule ``lowered``."""
    return path.removeprefix("lowered.")
