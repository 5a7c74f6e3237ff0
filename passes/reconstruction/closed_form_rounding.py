"""Closed-form rounding of one unit: its linears in topological order, each on what the ones before it make of the samples."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from tqdm import tqdm

from fp4dit_ao.observers import WeightObserver
from fp4dit_ao.observers.weight import Settled
from fp4dit_ao.passes.partition import Segment
from fp4dit_ao.passes.reconstruction.rounding import ClosedFormRounding
from fp4dit_ao.passes.reconstruction.shards import Shard
from fp4dit_ao.passes.reconstruction.unit_error import UnitError, settled


@dataclass(frozen=True)
class SharedInput:
    """Weights whose linears read the same values.

    Attributes:
        inputs: nodes of those values; several where one weight serves several linears.
        observers: of the weights.
    """

    inputs: list[Node]
    observers: list[WeightObserver]


def solve(error: UnitError, rule: ClosedFormRounding, bar: tqdm) -> dict[WeightObserver, Settled]:
    """The rounding of every observer of a unit; leaves it in the observers, too.

    Args:
        error: of the unit; its observers' codes are what not yet solved linears are rounded by.
        rule: how to round.
        bar: updated at each weight.

    Raises:
        ValueError: a weight that no linear multiplies, a Hessian that the rule cannot use, or codes that the format lacks.
    """
    for group in groups_by_input(error.segment):
        hessian = hessian_of(error, group.inputs) if rule.needs_hessian else None
        for observer in group.observers:
            own = None if hessian is None else hessian.clone()
            weight = error.weights[observer]
            observer.codes = _checked(
                rule, rule.solve(weight, error.grids[observer], own, observer.name), weight, observer
            )
            bar.update()
    return {observer: observer.settled for observer in error.weights}


def _checked(rule: ClosedFormRounding, codes: object, weight: Tensor, observer: WeightObserver) -> Tensor:
    """Codes that a rule returned, if they are such of the weight."""
    count = 2**observer.fmt.bits
    found = f"{codes.dtype} {tuple(codes.shape)}" if isinstance(codes, Tensor) else type(codes).__name__
    if isinstance(codes, Tensor) and codes.dtype == torch.uint8 and codes.shape == weight.shape:
        largest = int(codes.max()) if codes.numel() else 0
        if largest < count:
            return codes
        found = f"the code {largest}"
    raise ValueError(
        f"{observer.name}: {type(rule).__name__}.solve returned {found}; it must return codes below {count}, torch.uint8 "
        f"{tuple(weight.shape)}, as grid.encode does"
    )


def groups_by_input(segment: Segment) -> list[SharedInput]:
    """The weights of a segment by the inputs of their linears, in topological order."""
    place = {node: i for i, node in enumerate(segment.graph.graph.nodes)}
    groups: dict[tuple[Node, ...], list[WeightObserver]] = {}
    first: dict[tuple[Node, ...], int] = {}
    for node, observer in segment.observers:
        linears = [user for user in node.users if user.target is torch.ops.aten.linear.default]
        inputs = tuple(dict.fromkeys(n.args[0] for n in linears if isinstance(n.args[0], Node)))
        if not inputs:
            users = ", ".join(str(user.target) for user in node.users)
            raise ValueError(
                f"{observer.name}: the Hessian is that of a linear's input, but the weight goes to {users or 'nothing'}; "
                "choose a learned rounding"
            )
        groups.setdefault(inputs, []).append(observer)
        first[inputs] = min(first.get(inputs, len(place)), *(place[n] for n in linears))
    return [SharedInput(list(inputs), groups[inputs]) for inputs in sorted(groups, key=first.__getitem__)]


@torch.no_grad()
def hessian_of(error: UnitError, inputs: list[Node]) -> Tensor:
    """``2 X^T X``, float64, over all tokens of these values: on quantized inputs, with the weights as they stand.

    Products of a chunk of rows are float32, their sum float64.
    """
    run = up_to(error.segment.graph, inputs)

    def summed(shard: Shard) -> list[Tensor]:
        hessian: Tensor | None = None
        for stream in (error.streams[number] for number in shard.streams):
            for rows in stream.chunks(error.shards.chunk):
                for value in run(*stream.select(stream.quantized, error.segment.inputs, rows)):
                    tokens = value.reshape(-1, value.shape[-1]).float()
                    product = (tokens.T @ tokens).double()
                    hessian = product if hessian is None else hessian.add_(product)
        assert hessian is not None  # there is at least one row
        return [hessian]

    with settled(error.segment):
        (hessian,) = error.shards.sum_tensors(summed)
    return hessian.mul_(2)


def up_to(model: GraphModule, nodes: list[Node]) -> GraphModule:
    """The part of a graph that computes these nodes, from all of its inputs."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in model.graph.nodes:
        if node.op != "output":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in nodes))
    part = GraphModule(model, graph)
    part.graph.eliminate_dead_code()
    part.recompile()
    return part
