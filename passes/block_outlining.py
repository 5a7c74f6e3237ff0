"""Turns blocks of equal structure into calls of one submodule, with weights as arguments, so that it compiles once."""

import operator
import sys

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import Argument

from fp4dit_ao import _compat
from fp4dit_ao._compat import pytree
from fp4dit_ao.passes.partition import Segment, partition

_ATEN = torch.ops.aten
_CONVERSIONS = {_ATEN.to.dtype, _ATEN.to.dtype_layout, _ATEN.type_as.default}


def outline(model: GraphModule) -> GraphModule:
    """Rewrites a lowered graph so that its blocks call shared submodules ``block_0``, ``block_1``, …, one per kind of
    block.

    Most models have one kind of block; Hunyuan-DiT has two (blocks that a long skip enters, and the others), and where
    nothing reads the last block's text, it is of a kind of its own; recipes that choose formats per layer make more.
    Parameters keep their names and tensors; the results equal those of ``model`` in every bit. A graph without blocks
    becomes a single one.

    Args:
        model: the result of ``lower``; it is not changed.
    """
    convention = model.graph
    model = _with_blocks_apart(model)
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
    _compat.copy_calling_convention(graph, convention)
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module") and node.target not in attributes:
            attributes[str(node.target)] = operator.attrgetter(str(node.target))(model)
    outlined = GraphModule(attributes, graph)
    outlined.meta.update(model.meta)
    return outlined


def kinds_of_blocks(outlined: GraphModule) -> dict[str, GraphModule]:
    """Shared submodules of the result of :func:`outline`, by name."""
    names = [str(node.target) for node in outlined.graph.nodes if node.op == "call_module"]
    return {name: body for name in dict.fromkeys(names) if isinstance(body := getattr(outlined, name), GraphModule)}


def _with_blocks_apart(model: GraphModule) -> GraphModule:
    """Copy of ``model`` whose blocks hand on nothing but their results, so that the first and the last are like the others.

    Export computes a size such as twice the batch once, in the first block that needs it, and reads a shared parameter
    once; here every user has its own. A conversion to the type that a tensor has already gives the tensor itself, and export
    lets the next block read it from there; here there is none.
    """
    graph, copies = Graph(), dict[Node, Node]()
    graph.output(graph.graph_copy(model.graph, copies))
    for node in list(graph.nodes):
        if _returns_its_input(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        if node.op != "get_attr" and not _computes_size(node):
            continue
        for user in list(node.users):
            with graph.inserting_before(user):
                own = graph.node_copy(node, lambda source: source)
            if "nn_module_stack" in user.meta:
                own.meta["nn_module_stack"] = user.meta["nn_module_stack"]
            user.replace_input_with(node, own)
        graph.erase_node(node)
    apart = GraphModule(model, graph)
    apart.meta.update(model.meta)
    return apart


def _computes_size(node: Node) -> bool:
    """Whether a node computes an integer from integers."""
    sizes = [isinstance(value.meta.get("val"), int | torch.SymInt) for value in (node, *node.all_input_nodes)]
    return node.op == "call_function" and len(sizes) > 1 and all(sizes)


def _returns_its_input(node: Node) -> bool:
    """Whether a node returns its first argument as it is: a conversion to the type it has, or a slice of everything."""
    if node.target not in _CONVERSIONS and node.target is not _ATEN.slice.Tensor:
        return False
    if node.target is _ATEN.slice.Tensor:
        given, defaults = list(node.args[2:]), list[Argument]([None, None, 1])
        start, end, step = given + defaults[len(given) :]
        return start in (None, 0) and end in (None, sys.maxsize) and step in (None, 1) and not node.kwargs
    before, after = (value.meta.get("val") for value in (node.args[0], node) if isinstance(value, Node))
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    copies = any(value is not None for name, value in node.kwargs.items() if name in ("copy", "memory_format"))
    same = before.dtype == after.dtype and str(before.device) == str(after.device)
    return same and len(node.args) <= 2 and not copies


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
