"""Moves a graph to another device, including the devices that export wrote into it."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fp4dit_ao import _compat
from fp4dit_ao._compat import pytree
from fp4dit_ao.util.plain_mode import plain_mode

Model = TypeVar("Model", bound=nn.Module)


def move_to(model: GraphModule, device: torch.device | str) -> GraphModule:
    """Moves parameters and buffers to ``device``, and replaces every ``device=`` argument of the graph, in place.

    ``torch.export`` records the device of each tensor that the model creates (position tables, masks); ``.to(device)``
    of a GraphModule does not change those. If parameters are on the meta device, only the arguments are replaced.
    """
    target = torch.device(device)
    for node in model.graph.nodes:
        if node.op == "call_function":
            node.args, node.kwargs = pytree.tree_map(
                lambda value: target if isinstance(value, torch.device) else value, (node.args, dict(node.kwargs))
            )
    model.recompile()
    if not any(p.is_meta for p in (*model.parameters(), *model.buffers())):
        convert_tensors(model, lambda x: x.to(target))
    return model


def leave_inference_mode(model: Model) -> Model:
    """``model``, whose tensors of ``torch.inference_mode`` are replaced by equal ones, which can be learned and exported."""
    if any(x.is_inference() for x in (*model.parameters(), *model.buffers())):
        convert_tensors(model, lambda x: x)
    return model


def quantizing_device(device: torch.device) -> torch.device:
    """Where weights on ``device`` are rounded: those in host memory on the GPU if there is one, one after the other."""
    return torch.device("cuda") if device.type == "cpu" and torch.cuda.is_available() else device


@plain_mode()
def convert_tensors(model: nn.Module, convert: Callable[[Tensor], Tensor]) -> None:
    """Replaces every parameter and buffer ``x`` by ``convert(x)``; shared tensors stay shared. None is a tensor of
    ``torch.inference_mode`` afterwards.

    ``nn.Module.to`` swaps the contents of tensor subclasses in place, which fails while a compiled graph, for example,
    holds a weak reference to them; here modules get new parameters instead.
    """
    done: dict[int, tuple[Tensor, Tensor]] = {}  # by id; the old tensor is kept alive so that its id is not reused
    for module in model.modules():
        for slots in _compat.slots(module):
            for name, x in slots.items():
                if x is None:
                    continue
                if id(x) not in done:
                    y = convert(x.detach())
                    y = y.clone() if y.is_inference() else y
                    done[id(x)] = x, nn.Parameter(y, x.requires_grad) if isinstance(x, nn.Parameter) else y
                slots[name] = done[id(x)][1]
