"""Linears that a transform must treat alike, since they read the same tensor or share a weight; and the tensors of a graph."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import Argument

from fp4dit_ao import _compat
from fp4dit_ao._compat import Operator
from fp4dit_ao.passes.transforms.annotated_linears import AnnotatedLinear, linear_name

_BLOCK = re.compile(r"(?:.*?\.)??\d+(?=\.)")
"""The outermost numbered module in a name: the transformer block."""


@dataclass
class LinearGroup:
    """Linears that read the same tensor in one transformer block, or share a weight: their inputs are changed alike."""

    linears: list[AnnotatedLinear]

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(linear.name for linear in self.linears))

    @property
    def members(self) -> list[AnnotatedLinear]:
        """One linear for each weight."""
        return list({linear.name: linear for linear in self.linears}.values())

    @property
    def sources(self) -> list[Node]:
        """The nodes of their inputs; several where one weight serves several linears."""
        return list(dict.fromkeys(linear.source for linear in self.linears))

    @property
    def pattern(self) -> str:
        """The name of the group in whatever block."""
        return re.sub(r"\d+", "*", self.names[0])


def groups_by_input(graph: GraphModule, linears: list[AnnotatedLinear]) -> list[LinearGroup]:
    """Linears by what a change of their inputs must agree with, in the order of the graph.

    Those whose weight is tied to another parameter, or has another type than the input, are in none.
    """
    tensors = [x for _, x in graph.named_parameters(remove_duplicate=False)]
    groups: list[LinearGroup] = []
    by_key: dict[object, LinearGroup] = {}
    for linear in linears:
        weight = tensor_at(graph, linear.weight)
        fits = linear.source.meta["val"].dtype == weight.dtype and weight.is_floating_point()
        if not linear.name or not fits or sum(x is weight for x in tensors) > 1:
            continue
        keys: list[object] = [(linear.source, block_of(linear.name)), linear.weight]
        found = list({id(by_key[key]): by_key[key] for key in keys if key in by_key}.values())
        group = found[0] if found else LinearGroup([])
        if not found:
            groups.append(group)
        for other in found[1:]:
            group.linears += other.linears
            groups = [kept for kept in groups if kept is not other]
            by_key = {key: group if value is other else value for key, value in by_key.items()}
        group.linears.append(linear)
        by_key.update(dict.fromkeys(keys, group))
    return groups


def block_of(name: str) -> str | None:
    """The transformer block that a module's or parameter's name lies in, ``transformer_blocks.3``; None outside of blocks."""
    block = _BLOCK.match(name)
    return block and block.group()


def nodes_by_linear(graph: GraphModule) -> dict[str, list[Node]]:
    """The calls of every linear, by the name of the module that owns its weight."""
    found: dict[str, list[Node]] = {}
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.linear.default:
            found.setdefault(linear_name(node), []).append(node)
    return found


def calls_of(linears: dict[str, list[Node]], names: list[str], what: str) -> list[Node]:
    """The calls of the linears ``names`` among :func:`nodes_by_linear`.

    Raises:
        ValueError: the graph lacks one, which ``what`` was done to.
    """
    missing = next((name for name in names if name not in linears), None)
    if missing is not None:
        raise ValueError(f"the graph has no linear {missing}, which was {what}; it is of another model")
    return [node for name in names for node in linears[name]]


def module_of(model: nn.Module, name: str, what: str) -> nn.Linear:
    """The linear ``name`` of a model.

    Raises:
        ValueError: the model has none, which ``what`` was done to.
    """
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        linear = None
    if not isinstance(linear, nn.Linear):
        raise ValueError(f"{type(model).__name__} has no linear {name}, which was {what}")
    return linear


def tensor_at(graph: GraphModule, path: str) -> Tensor:
    """The parameter or buffer of that fully qualified name."""
    owner, _, leaf = path.rpartition(".")
    tensor: Tensor = getattr(graph.get_submodule(owner), leaf)
    return tensor


def replace_parameter(graph: GraphModule, path: str, value: Tensor) -> None:
    """Give the graph another parameter of that name: the old one may be that of the model that was captured."""
    owner, _, leaf = path.rpartition(".")
    old = tensor_at(graph, path)
    setattr(graph.get_submodule(owner), leaf, nn.Parameter(value.to(old.dtype), old.requires_grad))


def readers_by_source(graph: GraphModule, nodes: list[Node]) -> list[tuple[Node, list[Node]]]:
    """The inputs of some linears, each with the linears that read it, in the order of the graph."""
    order = {node: position for position, node in enumerate(graph.graph.nodes)}
    found: dict[Node, list[Node]] = {}
    for node in sorted(nodes, key=order.__getitem__):
        source = node.args[0]
        assert isinstance(source, Node)
        found.setdefault(source, []).append(node)
    return list(found.items())


def stored_tensor(graph: GraphModule, like: Node, path: str, value: Tensor) -> Node:
    """The node of the buffer ``path``, at the current insertion point: the graph's own, or a new one that holds ``value``.

    Args:
        graph: to add it to.
        like: node whose place among the modules it has.
        path: fully qualified name.
        value: of a new buffer.
    """
    if any(name == path for name, _ in graph.named_buffers(remove_duplicate=False)):
        node = graph.graph.get_attr(path)
    else:
        node = _compat.create_buffer_node(graph, path, value)
    node.meta = {k: v for k, v in like.meta.items() if k in ("nn_module_stack", "stack_trace")}
    source: Tensor = like.args[0].meta["val"]  # type: ignore[union-attr]
    node.meta["val"] = source.new_empty(value.shape, dtype=value.dtype)
    return node


def call(graph: GraphModule, like: Node, target: Operator, arguments: tuple[Argument, ...], value: Tensor) -> Node:
    """A call at the current insertion point, at the place among the modules that ``like`` has, of a result like ``value``."""
    node = graph.graph.call_function(target, arguments)
    node.meta = dict(like.meta) | {"val": value}
    return node
