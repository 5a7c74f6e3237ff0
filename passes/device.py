"""Move a graph to another device, together with the devices that export wrote into it."""

import torch
from torch.fx import GraphModule
from torch.utils import _pytree as pytree


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
        model.to(target)
    return model
