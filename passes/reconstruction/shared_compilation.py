"""One compilation for all units of one structure: a model's blocks are alike, and each takes seconds to compile.

The compiled function takes what differs between the blocks, weights and biases, as arguments.
"""

import copy
import functools
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from fp4dit_ao.observers import WeightObserver
from fp4dit_ao.observers.activation import ActivationObserver

KEPT = 64
"""Compiled functions that are kept, two for each kind of unit: a model has one or two kinds of blocks, and as many kinds of
layers as shapes."""

Runs = Callable[..., Sequence[Tensor]]


def compiled(graph: GraphModule, fixed: bool) -> Runs:
    """The graph under ``torch.compile``.

    Args:
        graph: with observers set to fake quantization, as they will be in every call.
        fixed: whether its inputs have the same shapes in every call.
    """
    if fixed and all(_is_shareable(graph, node) for node in graph.graph.nodes):
        return Shared(graph)
    found: Runs = torch.compile(graph)
    return found


def _is_shareable(graph: GraphModule, node: Node) -> bool:
    """Whether nothing that the node's module holds tells it from its like in other graphs, but a weight and its rounding."""
    if node.op != "call_module":
        return True
    module = graph.get_submodule(str(node.target))
    if isinstance(module, WeightObserver):
        return _source(node).op == "get_attr"
    holds = [*module.parameters(), *module.buffers(), *module.children()]
    return isinstance(module, ActivationObserver) and not holds


class Shared:
    """``graph``, compiled together with every other one of its structure; called like it.

    Which code runs depends on structure and shapes alone, not on what ran before, so that a resumed run computes the same bits.

    Args:
        graph: of which :func:`compiled` says that it can be shared.
    """

    def __init__(self, graph: GraphModule):
        self._graph, self._constants = graph, list(_constants(graph))
        self._lifted, self._structure = _lifted(graph, self._constants)

    def __call__(self, *inputs: object) -> Sequence[Tensor]:
        """Results of the graph."""
        values = (*inputs, *map(self._value, self._constants))
        key = (*self._structure, torch.is_grad_enabled(), *map(kind, values))
        return once_per_structure(self._lifted, key)(*values)

    def _value(self, node: Node) -> Tensor:
        if node.op == "get_attr":
            return _attribute(self._graph, node)
        rounded: Tensor = self._graph.get_submodule(str(node.target))(_attribute(self._graph, _source(node)))
        return rounded


class _Structure:
    """A graph that is found by its structure."""

    def __init__(self, key: tuple[Hashable, ...], graph: GraphModule):
        self.key, self.graph = key, graph

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Structure) and self.key == other.key


@functools.lru_cache(KEPT)
def _compiled(structure: _Structure) -> Runs:
    """A graph of its own for each combination of shapes: the compiler's limit of variants of a function does not count them."""
    found: Runs = torch.compile(copy.deepcopy(structure.graph), dynamic=False)
    return found


def once_per_structure(graph: GraphModule, key: tuple[Hashable, ...]) -> Runs:
    """A graph under ``torch.compile``, or what was compiled before of one with this key; it holds no tensors.

    Args:
        graph: without parameters and buffers.
        key: all that compiled code depends on: the graph's structure, and kinds of its arguments.
    """
    return _compiled(_Structure(key, graph))


def forget() -> None:
    """Lets go of everything that was compiled."""
    _compiled.cache_clear()


def _constants(graph: GraphModule) -> Iterator[Node]:
    """Nodes that become arguments: rounded weights, and tensors that are not rounded."""
    for node in graph.graph.nodes:
        if _is_rounded(graph, node) or (
            node.op == "get_attr" and not all(_is_rounded(graph, user) for user in node.users)
        ):
            yield node


def _is_rounded(graph: GraphModule, node: Node) -> bool:
    return node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), WeightObserver)


def _lifted(graph: GraphModule, constants: Sequence[Node]) -> tuple[GraphModule, tuple[Hashable, ...]]:
    """The graph with these nodes as arguments behind its own, and what others of the same structure have in common with it."""
    lifted, copies = Graph(), dict[Node, Node]()
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for number, node in enumerate((*inputs, *constants)):
        copies[node] = lifted.placeholder(f"argument_{number}")
    numbers = {node: _Number(number) for number, node in enumerate(copies)}
    modules, structure = dict[str, nn.Module](), list[Hashable]([len(inputs), len(constants)])
    for node in graph.graph.nodes:
        if node in copies or node.op == "get_attr":
            continue
        numbers[node] = _Number(len(numbers))
        target: Hashable = node.target
        new = lifted.node_copy(node, copies.__getitem__)
        if node.op == "call_module":
            observer = graph.get_submodule(str(node.target))
            new.target = f"observer_{len(modules)}"
            modules[new.target], target = copy.deepcopy(observer), _settings(observer)
        copies[node] = new
        values = map_aggregate((node.args, node.kwargs), lambda x: numbers[x] if isinstance(x, Node) else x)  # type: ignore[arg-type, return-value]
        structure.append((node.op, target, repr(values)))
    return GraphModule(modules, lifted), tuple(structure)


class _Number(int):
    """Position of a node, which ``repr`` tells from a number."""

    def __repr__(self) -> str:
        return f"%{int(self)}"


def _settings(observer: nn.Module) -> Hashable:
    """Class and attributes, but for the name, which decide what an observer without tensors computes."""
    values = {name: x for name, x in vars(observer).items() if not name.startswith("_") and name != "name"}
    return (type(observer), repr(values))


def _source(node: Node) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def _attribute(graph: GraphModule, node: Node) -> Tensor:
    owner, _, leaf = str(node.target).rpartition(".")
    found: Tensor = getattr(graph.get_submodule(owner), leaf)
    return found


def kind(value: object) -> Hashable:
    """Properties of an argument that compiled code is made for."""
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype, value.device, value.requires_grad)
    return repr(value)
