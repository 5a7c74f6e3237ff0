"""Cuts a graph into its transformer blocks and the nodes between them, in topological order."""

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node
from torchao.utils import TorchAOBaseTensor

from fp4dit_ao.observers import FloatObserver, WeightObserver

_BLOCK = re.compile(r"(.*\.)?\d+")
GLUE, WHOLE = "(glue)", "(model)"
"""Names of segments that are not blocks: nodes between blocks, and a whole graph that is not made of blocks."""


@dataclass
class Segment:
    """One piece of a graph, callable on its own.

    Attributes:
        name: fully qualified name of the block or of a linear between blocks, or ``GLUE`` or ``WHOLE``.
        block: whether the segment is a block (or the whole graph); False for nodes between blocks.
        graph: shares parameters, buffers and observers with the whole graph; takes ``inputs``, returns a tuple of
            ``outputs``.
        inputs: names of the values that the segment reads, which are nodes of the whole graph.
        outputs: names of the values that later segments or the result read.
        dead: names of the values that nothing reads after this segment.
    """

    name: str
    block: bool
    graph: GraphModule
    inputs: list[str]
    outputs: list[str]
    dead: list[str]

    @property
    def quantizes(self) -> bool:
        """Whether the segment holds an observer."""
        return any(isinstance(module, FloatObserver) for module in self.graph.modules())

    @property
    def observers(self) -> list[tuple[Node, WeightObserver]]:
        """Weight observers of the segment, with their nodes."""
        return list(weight_observers(self.graph))


def quantized_linears(graph: GraphModule) -> list[Node]:
    """The linears of a prepared graph that multiply an observed weight, in the order of the graph."""
    found = {user for node, _ in weight_observers(graph) for user in node.users}
    return [node for node in graph.graph.nodes if node in found and node.target is torch.ops.aten.linear.default]


def weight_observers(graph: GraphModule) -> Iterator[tuple[Node, WeightObserver]]:
    """Yields (node, observer) for every weight observer of a prepared graph."""
    for node in graph.graph.nodes:
        if node.op == "call_module":
            observer = graph.get_submodule(str(node.target))
            if isinstance(observer, WeightObserver):
                yield node, observer


def _low_bit_linears(model: GraphModule) -> Iterator[Node]:
    """Yields the linears of a lowered graph whose weight is quantized."""
    weights = {
        name for name, parameter in model.named_parameters() if isinstance(parameter.detach(), TorchAOBaseTensor)
    }
    for node in model.graph.nodes:
        if node.target is torch.ops.aten.linear.default and str(node.args[1].target) in weights:
            yield node


def cut_into_blocks(model: GraphModule) -> "Cut":
    """The cut that :func:`partition` makes."""
    return Cut(model, *_stages(model))


def block_names(model: GraphModule) -> list[str]:
    """Names of a graph's blocks, in order: ``["transformer_blocks.0", ...]``; empty if it is not made of blocks."""
    return [name for name in _stages(model)[1].values() if name != WHOLE]


def partition(model: GraphModule) -> list[Segment]:
    """Segments of ``model``; run one after the other they compute the same as ``model``.

    The block of a node is the outermost module with a numbered name (``transformer_blocks.3``) in its
    ``nn_module_stack``, provided that the block holds a weight observer or a quantized weight. Without blocks, or if
    blocks interleave, the whole graph is one segment. A segment between blocks is named after its first quantized
    linear, if it has one.
    """
    return cut_into_blocks(model).segments()


class Cut:
    """A graph cut into consecutive stages.

    Args:
        model: the whole graph.
        stages: the stage of every node but placeholders and the output; no node precedes what it reads.
        names: fully qualified names of the stages that are a block or a linear; the others lie between them.
    """

    def __init__(self, model: GraphModule, stages: dict[Node, int], names: dict[int, str]):
        self.model, self.stages, self.names = model, stages, names
        self._order = sorted(set(stages.values()))
        self._nodes = [node for node in model.graph.nodes if node.op not in ("placeholder", "output")]
        self._last = {
            node: max((stages[user] for user in node.users if user in stages), default=-1) for node in model.graph.nodes
        }
        self._result = {node for node in model.graph.nodes for user in node.users if user.op == "output"}

    def segments(self) -> list[Segment]:
        """A segment for every stage, in order."""
        return [self.merged(position, position) for position in range(len(self._order))]

    def merged(self, first: int, last: int) -> Segment:
        """One segment for the stages at positions ``first`` to ``last`` (inclusive) of :meth:`segments`."""
        begin, end = self._order[first], self._order[last]
        final = end == self._order[-1]
        inside = [node for node in self._nodes if begin <= self.stages[node] <= end]
        members = set(inside)
        inputs = list(dict.fromkeys(a for node in inside for a in node.all_input_nodes if a not in members))
        outputs = [node for node in inside if self._last[node] > end or node in self._result]
        dead = [
            node.name for node in (*inputs, *outputs) if node not in self._result and (self._last[node] <= end or final)
        ]
        graph = _extract(self.model, inside, inputs, outputs)
        named = [self.names[stage] for stage in self._order[first : last + 1] if stage in self.names]
        linears = (observer.name.removesuffix(".weight") for _, observer in weight_observers(graph))
        name = " … ".join(dict.fromkeys((named[0], named[-1]))) if named else next(linears, GLUE)
        return Segment(name, bool(named), graph, [n.name for n in inputs], [n.name for n in outputs], dead)


def _stages(model: GraphModule) -> tuple[dict[Node, int], dict[int, str]]:
    """Position of every node's segment, odd for blocks and even between them; and the names of blocks by position."""
    labels = _labels(model)
    order = {name: 2 * i + 1 for i, name in enumerate(dict.fromkeys(label for label in labels.values() if label))}
    constants = constant_nodes(model)
    stages: dict[Node, int] = {}
    for node in model.graph.nodes:
        if node.op in ("placeholder", "output") or node in constants:
            continue
        after = max((stages.get(source, 0) for source in node.all_input_nodes), default=0)
        label = labels.get(node)
        if label is None:
            stages[node] = after + after % 2 if node.users else after  # assertions stay with their value
        elif after > order[label]:
            return _one_segment(model)
        else:
            stages[node] = order[label]
    if not order:
        return _one_segment(model)
    place_constants(model, stages, constants)
    return stages, {stage: name for name, stage in order.items()}


def _one_segment(model: GraphModule) -> tuple[dict[Node, int], dict[int, str]]:
    return {node: 1 for node in model.graph.nodes if node.op not in ("placeholder", "output")}, {1: WHOLE}


def place_constants(model: GraphModule, stages: dict[Node, int], constants: set[Node]) -> None:
    """Put every constant into the first stage that uses it."""
    for node in reversed(model.graph.nodes):
        if node in constants:
            stages[node] = min((stages[user] for user in node.users if user in stages), default=0)


def constant_nodes(model: GraphModule) -> set[Node]:
    """Parameters, and nodes computed from parameters only (such as observed weights), which belong to their users'
    segment."""
    constants: set[Node] = set()
    for node in model.graph.nodes:
        if node.op == "get_attr" or (node.all_input_nodes and constants.issuperset(node.all_input_nodes)):
            constants.add(node)
    return constants


def _labels(model: GraphModule) -> dict[Node, str | None]:
    """Block of every node, None outside of blocks. Observers, which have no module stack, belong to the block of a
    user."""
    labels: dict[Node, str | None] = {}
    for node in reversed(model.graph.nodes):
        if node.op == "call_module" and isinstance(model.get_submodule(str(node.target)), FloatObserver):
            labels[node] = next((labels[user] for user in sorted(node.users) if labels.get(user)), None)
        else:
            labels[node] = _block_of(node)
    quantized = {labels[node] for node, _ in weight_observers(model)} | {labels[n] for n in _low_bit_linears(model)}
    labels = {node: labels[node] if labels[node] in quantized else None for node in model.graph.nodes}
    _adopt(labels)
    return labels


def _adopt(labels: dict[Node, str | None]) -> None:
    """Assigns nodes between two nodes of one block to that block: rewrites may have dropped their module stack."""
    before: dict[Node, set[str]] = {}  # blocks from which a node is reached through such nodes
    for node in labels:
        before[node] = _reached(node.all_input_nodes, labels, before)
    after: dict[Node, set[str]] = {}  # blocks that a node reaches through such nodes
    for node in reversed(labels):
        after[node] = _reached(node.users, labels, after)
    for node, label in list(labels.items()):
        both = before[node] & after[node]
        if label is None and len(both) == 1:
            labels[node] = both.pop()


def _reached(neighbours: Iterable[Node], labels: dict[Node, str | None], beyond: dict[Node, set[str]]) -> set[str]:
    found: set[str] = set()
    for node in neighbours:
        label = labels[node]
        found |= beyond[node] if label is None else {label}
    return found


def _block_of(node: Node) -> str | None:
    for name, _ in node.meta.get("nn_module_stack", {}).values():
        if _BLOCK.fullmatch(name):
            return str(name)
    return None


def _extract(model: GraphModule, inside: list[Node], inputs: list[Node], outputs: list[Node]) -> GraphModule:
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in inside:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outputs))
    return GraphModule(model, graph)


def with_outputs(segment: Segment, nodes: Collection[Node]) -> GraphModule:
    """A segment's graph that also puts out ``nodes`` of it, behind its own outputs and in the order of ``nodes``; it shares
    parameters, buffers and observers with the segment's."""
    graph, copies = Graph(), dict[Node, Node]()
    for node in segment.graph.graph.nodes:
        if node.op == "output":
            graph.output(tuple(copies[each] for each in (*node.args[0], *nodes)))
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return GraphModule(segment.graph, graph)
