"""Turns blocks of equal structure into calls of one submodule, with weights as arguments, so that it compiles once."""

import operator

from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import Argument

from fp4dit_ao import _compat
from fp4dit_ao._compat import pytree
from fp4dit_ao.passes.partition import Segment, partition


def outline(model: GraphModule) -> GraphModule:
    """Rewrites a lowered graph so that its blocks call shared submodules ``block_0``, ``block_1``, …, one per kind of
    block.

    Most models have one kind of block; Hunyuan-DiT has four (the first, those that a long skip leaves, the middle one,
    those that a long skip enters); recipes that choose formats per layer make more. Parameters keep their names and
    tensors; the results equal those of ``model`` in every bit. A graph without blocks becomes a single one.

    Args:
        model: the result of ``lower``; it is not changed.
    """
    graph = Graph()
    values: dict[str, Argument] = {}  # by the name of a node of ``model``
    kinds: dict[str, str] = {}  # names by structure
    attributes: dict[str, object] = {}
    for node in model.graph.nodes:
        if node.op == "placeholder":
            values[node.name] = graph.node_copy(node)
    for segment in partition(model):
        if not segment.block:
            _inline(graph, segment, values)
        else:
            body, paths = _with_weights_as_arguments(segment)
            kind = kinds.setdefault(_structure(body), f"block_{len(kinds)}")
            attributes.setdefault(kind, body)
            arguments = [*(values[name] for name in segment.inputs), *(graph.get_attr(path) for path in paths)]
            call = graph.call_module(kind, tuple(arguments))
            for index, name in enumerate(segment.outputs):
                values[name] = graph.call_function(operator.getitem, (call, index))
    [output] = [node for node in model.graph.nodes if node.op == "output"]
    graph.output(pytree.tree_map_only(Node, lambda node: values[node.name], output.args[0]))
    _compat.copy_calling_convention(graph, model.graph)
    for node in graph.nodes:
        if node.op == "get_attr":
            attributes[str(node.target)] = operator.attrgetter(str(node.target))(model)
    outlined = GraphModule(attributes, graph)
    outlined.meta.update(model.meta)
    return outlined


def kinds_of_blocks(outlined: GraphModule) -> dict[str, GraphModule]:
    """Shared submodules of the result of :func:`outline`, by name."""
    names = [str(node.target) for node in outlined.graph.nodes if node.op == "call_module"]
    return {name: body for name in dict.fromkeys(names) if isinstance(body := getattr(outlined, name), GraphModule)}


def _inline(graph: Graph, segment: Segment, values: dict[str, Argument]) -> None:
    copies: dict[Node, Argument] = {}
    for node in segment.graph.graph.nodes:
        if node.op == "placeholder":
            copies[node] = values[node.name]
        elif node.op == "output":
            values.update(zip(segment.outputs, (copies[result] for result in node.args[0]), strict=True))
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)


def _with_weights_as_arguments(segment: Segment) -> tuple[GraphModule, list[str]]:
    """Block that takes its parameters as arguments after its inputs, and the paths of those parameters."""
    graph = Graph()
    nodes = list(segment.graph.graph.nodes)
    copies: dict[Node, Node] = {node: graph.node_copy(node) for node in nodes if node.op == "placeholder"}
    by_path: dict[str, Node] = {}
    for node in nodes:
        if node.op == "get_attr":
            path = str(node.target)
            if path not in by_path:
                by_path[path] = graph.placeholder(f"parameter_{len(by_path)}")
                by_path[path].meta["val"] = operator.attrgetter(path)(segment.graph)
            copies[node] = by_path[path]
    for node in nodes:
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return GraphModule(segment.graph, graph), list(by_path)


def _structure(body: GraphModule) -> str:
    """Text that is equal for blocks that do the same computation with their inputs and weights."""
    numbers: dict[Node, str] = {}
    lines = []
    for node in body.graph.nodes:
        numbers[node] = f"%{len(numbers)}"
        if node.op == "placeholder":
            lines.append(_kind_of_value(node.meta.get("val")))
        else:
            arguments = pytree.tree_map_only(Node, numbers.__getitem__, (node.args, node.kwargs))
            lines.append(f"{node.op} {node.target} {arguments}")
    return "\n".join(lines)


def _kind_of_value(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    sizes = [size if isinstance(size, int) else "?" for size in value.shape]
    parts = [f"{type(value).__name__} {value.dtype} {sizes}"]
    if hasattr(value, "__tensor_flatten__"):
        names, context = value.__tensor_flatten__()
        parts += [str(context), *(_kind_of_value(getattr(value, name)) for name in names)]
    return " ".join(parts)
