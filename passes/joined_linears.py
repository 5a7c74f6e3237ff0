"""Joins linears that read the same value, such as q, k and v, into one product: a call instead of three, and a larger one.

For graphs that are compiled, after all else. The joined weight holds the rows of the others one below the other, and each of
these becomes a view of its own rows, so that the graph it came from keeps its names and no weight is in memory twice. Rows of a
weight do not know of each other, and a missing bias counts as -0.0, which changes no number: each output has the bits that it
had. (FP8 products are the exception: a vendor's library may add in another order where there are more rows.)
"""

import operator
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fp4dit_ao import _compat
from fp4dit_ao.passes.transforms.linear_groups import block_of, tensor_at
from fp4dit_ao.tensors.quantized_weight import QuantizedWeight

_ATEN = torch.ops.aten
_WEIGHT, _BIAS = "joined_weight", "joined_bias"
"""Names of the new parameters, beside the first linear's own."""


class _Member(NamedTuple):
    """A linear that may be joined, with the names and values of its parameters."""

    node: Node
    path: str
    weight: QuantizedWeight
    bias_path: str | None
    bias: Tensor | None


class _Joined(NamedTuple):
    """Names of joined parameters."""

    weight: str
    bias: str | None


def join_linears(model: GraphModule) -> GraphModule:
    """Rewrites linears of one block that read the same value to slices of one linear's output.

    They are those with low-bit products whose weights can be the rows of one weight: of the same formats, group size and
    types. Others, such as one that is kept in high precision, stay as they are.

    Args:
        model: the result of ``lower``. Its graph is not changed; its joined weights and biases, whose values stay, become
            views of the joined ones.

    Returns:
        a graph that computes the same bits and shares all tensors with ``model``.
    """
    graph, new, known = Graph(), dict[str, object](), dict[tuple[str, ...], _Joined]()
    graph.output(graph.graph_copy(model.graph, {}))
    _compat.copy_calling_convention(graph, model.graph)
    groups = _groups(model, graph)
    while groups:
        members = groups.pop(0)  # the last to hold these weights
        paths = tuple(member.path for member in members)
        if paths not in known:
            if any(path in other for other in known for path in paths):
                continue  # a weight's memory is a part of one other weight at most
            known[paths] = _join_parameters(model, members, new)
        _join_nodes(graph, members, known[paths])
    for node in reversed(list(graph.nodes)):  # of the members alone: what else nothing reads may check its input
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    graph.lint()
    read = dict.fromkeys(str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module"))
    joined = GraphModule({path: new[path] if path in new else operator.attrgetter(path)(model) for path in read}, graph)
    joined.meta.update(model.meta)
    return joined


def _groups(model: GraphModule, graph: Graph) -> list[list[_Member]]:
    """Linears of ``graph`` to be joined, at least two in each group, in its order."""
    found: dict[object, dict[str, _Member]] = {}
    for node in graph.nodes:
        member = _member(model, node) if node.target is _ATEN.linear.default else None
        if member is not None and (kind := member.weight.kind_of_rows()) is not None:
            key = node.args[0], block_of(member.path), kind, member.weight.unit().name
            found.setdefault(key, {}).setdefault(member.path, member)
    groups = []
    for members in map(list, map(dict.values, found.values())):
        types = {(member.bias.dtype, member.bias.device) for member in members if member.bias is not None}
        if len(members) > 1 and len(types) < 2:
            groups.append(members)
    return groups


def _member(model: GraphModule, node: Node) -> _Member | None:
    """None for a linear that must stay: one whose product is not of low-bit integers, or whose bias is computed."""
    paths = []
    for source in node.args[1:]:
        if isinstance(source, Node):
            if source.op != "get_attr":
                return None
            paths.append(str(source.target))
    weight, *biases = (tensor_at(model, path).detach() for path in paths)
    if not isinstance(weight, QuantizedWeight) or getattr(weight, "act_fmt", None) is None or not weight.unit().low_bit:
        return None
    return _Member(node, paths[0], weight, paths[1] if biases else None, biases[0] if biases else None)


def _join_parameters(model: GraphModule, members: Sequence[_Member], new: dict[str, object]) -> _Joined:
    """Puts the joined weight and bias into ``new``; those of ``model`` become views of them."""
    weight, bias = torch.cat([member.weight for member in members]), _joined_bias(members)
    assert isinstance(weight, QuantizedWeight)
    joined = _Joined(
        _free_name(model, members[0].path, _WEIGHT, new),
        None if bias is None else _free_name(model, members[0].path, _BIAS, new),
    )
    new[joined.weight] = nn.Parameter(weight, requires_grad=False)
    if joined.bias is not None and bias is not None:
        new[joined.bias] = nn.Parameter(bias, requires_grad=False)
    for member, (start, stop) in zip(members, _rows(members), strict=True):
        _replace(model, member.path, weight.part(0, start, stop))
        if member.bias_path is not None:
            assert bias is not None
            _replace(model, member.bias_path, bias[start:stop])
    return joined


def _joined_bias(members: Sequence[_Member]) -> Tensor | None:
    given = next((member.bias for member in members if member.bias is not None), None)
    if given is None:
        return None
    none = (given.new_full((member.weight.shape[0],), -0.0) for member in members)
    return torch.cat(
        [zeros if member.bias is None else member.bias for member, zeros in zip(members, none, strict=True)]
    )


def _join_nodes(graph: Graph, members: Sequence[_Member], joined: _Joined) -> None:
    first = members[0].node
    with graph.inserting_before(first):
        parameters = [graph.get_attr(path) for path in joined if path is not None]
        product = graph.call_function(_ATEN.linear.default, (first.args[0], *parameters))
        product.meta.update({key: value for key, value in first.meta.items() if key != "val"})
        for member, (start, stop) in zip(members, _rows(members), strict=True):
            part = graph.call_function(_ATEN.slice.Tensor, (product, -1, start, stop))
            part.meta.update(member.node.meta)
            member.node.replace_all_uses_with(part)
            _allow_copies(part)
    for member in members:
        graph.erase_node(member.node)


def _allow_copies(part: Node) -> None:
    """Turns views of a slice into reshapes: features of a token lie together, those of two tokens do not."""
    for user in part.users:
        if user.target is _ATEN.view.default:
            user.target = _ATEN.reshape.default
        if user.op == "call_function" and _compat.is_view(user.target):
            _allow_copies(user)


def _rows(members: Sequence[_Member]) -> list[tuple[int, int]]:
    """First row, and the one after the last, of every linear in the joined weight."""
    sizes = [member.weight.shape[0] for member in members]
    return [(sum(sizes[:index]), sum(sizes[: index + 1])) for index in range(len(sizes))]


def _replace(model: GraphModule, path: str, value: Tensor) -> None:
    owner, _, leaf = path.rpartition(".")
    parameters, buffers = _compat.slots(model.get_submodule(owner))
    if leaf in parameters:
        parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        buffers[leaf] = value


def _free_name(model: GraphModule, path: str, leaf: str, new: Mapping[str, object]) -> str:
    """A path that no tensor has, beside the one at ``path``."""
    owner = path.rpartition(".")[0]
    prefix = f"{owner}." if owner else ""
    while hasattr(model.get_submodule(owner), leaf) or prefix + leaf in new:
        leaf += "_"
    return prefix + leaf
