"""One linear at a time, in topological order (AdaRound, arXiv 2004.10568)."""

import torch
from torch.fx import GraphModule, Node

from fp4dit_ao.config import ReconstructionConfig
from fp4dit_ao.passes.partition import Cut, constant_nodes, place_constants, weight_observers
from fp4dit_ao.passes.reconstruction.scopes.scope import Plan, Unit


def layer(prepared: GraphModule, config: ReconstructionConfig) -> Plan:
    """A unit for every quantized linear; its input is what the linears before it, already rounded, make of the samples."""
    steps = cut_into_linears(prepared).segments()
    return Plan(steps, [Unit(segment, i, i) for i, segment in enumerate(steps) if segment.observers])


def cut_into_linears(model: GraphModule) -> Cut:
    """Quantized linears at odd stages, in the order of the graph; everything else at the even stages between them."""
    names = {
        user: observer.name.removesuffix(".weight")
        for node, observer in weight_observers(model)
        for user in node.users
        if user.target is torch.ops.aten.linear.default
    }
    constants = constant_nodes(model)
    stages: dict[Node, int] = {}
    named: dict[int, str] = {}
    for node in model.graph.nodes:
        if node.op in ("placeholder", "output") or node in constants:
            continue
        after = max((stages.get(source, 0) for source in node.all_input_nodes), default=0)
        if node in names:
            stages[node] = 2 * len(named) + 1
            named[stages[node]] = names[node]
        else:
            stages[node] = after + after % 2 if node.users else after  # an assertion stays with what it asserts
    place_constants(model, stages, constants)
    return Cut(model, stages, named)
