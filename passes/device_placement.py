"""Move a graph to another device, together with the devices that export wrote into it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fp4dit_ao import _compat
from fp4dit_ao._compat import pytree


def move_to(model: GraphModule, device: torch.device | str) -> GraphModule:
    """Move parameters and buffers, and every ``device=`` argument of the graph, in place.

    ``torch.export`` records the device of each tensor that the model creates (position tables, masks); ``.to(device)`` on
    a GraphModule leaves those behind. Parameters on the meta device must be given values first.
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


def convert_tensors(model: nn.Module, convert: Callable[[Tensor], Tensor]) -> None:
    """Replace every parameter and buffer by ``convert`` of it; what is shared stays shared.

    ``nn.Module.to`` swaps the contents of tensor subclasses in place, which fails while anything, such as a compiled
    graph, holds a weak reference to them; here modules simply get new parameters.
    """
    done: dict[int, tuple[Tensor, Tensor]] = {}  # by id; holding the old one keeps its id from being used again
    for module in model.modules():
        for slots in _compat.slots(module):
            for name, x in slots.items():
                if x is None:
                    continue
                if id(x) not in done:
                    y = convert(x.detach())
                    done[id(x)] = x, nn.Parameter(y, x.requires_grad) if isinstance(x, nn.Parameter) else y
                slots[name] = done[id(x)][1]
