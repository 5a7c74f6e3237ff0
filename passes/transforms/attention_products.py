"""``scaled_dot_product_attention`` as the two products that it is, so that its probabilities are an edge of the graph."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fp4dit_ao.kernels.attention import arguments_of
from fp4dit_ao.passes.transforms.linear_groups import call

_ATEN = torch.ops.aten
_SOFTMAX = _ATEN._safe_softmax.default
_END = 2**63 - 1


@dataclass(frozen=True)
class AttentionProducts:
    """Attention in the form of :func:`split_attention`.

    Attributes:
        result: the product of probabilities and values.
        probabilities: ``(batch, heads, queries, keys)``.
        scores: the product of queries and keys.
        edges: of q, k and v: what is read, and by which node. Without a first key that stays in high precision.
        keeps_first: whether the first key and its probability are apart, as a text's start token is in cross-attention.
    """

    result: Node
    probabilities: Node
    scores: Node
    edges: tuple[tuple[Node, Node], ...]
    keeps_first: bool


def split_attention(graph: GraphModule, node: Node) -> bool:
    """Put ``softmax(q k^T * scale + mask) v`` in the place of an attention's node; False if it asks for more than that.

    Products and the softmax are float32, as inside of PyTorch's attention. Where there are other keys than queries, which is
    cross-attention to a text, the first key is a slice of its own.
    """
    found = arguments_of(node.args, node.kwargs)
    if found is None or any(not isinstance(x, Node) or x.meta["val"].ndim != 4 for x in found[:3]):
        return False
    q, k, v, mask, scale = found
    values: list[Tensor] = [x.meta["val"] for x in (q, k, v)]
    apart = str(values[0].shape[-2]) != str(values[1].shape[-2])
    factor = values[0].shape[-1] ** -0.5 if scale is None else scale
    with graph.graph.inserting_before(node):
        if apart:
            first = call(graph, node, _ATEN.slice.Tensor, (k, -2, 0, 1), values[1][..., :1, :])
            rest = call(graph, node, _ATEN.slice.Tensor, (k, -2, 1, _END), values[1][..., 1:, :])
            k = call(graph, node, _ATEN.cat.default, ([first, rest], -2), values[1])
        q, k, v = (
            x if value.dtype == torch.float32 else call(graph, node, _ATEN.to.dtype, (x, torch.float32), value.float())
            for x, value in zip((q, k, v), values, strict=True)
        )
        values = [value.float() for value in values]
        turned = call(graph, node, _ATEN.transpose.int, (k, -2, -1), values[1].mT)
        product = values[0] @ values[1].mT
        scores = call(graph, node, _ATEN.matmul.default, (q, turned), product)
        scores = call(graph, node, _ATEN.mul.Tensor, (scores, factor), product)
        if isinstance(mask, Node) and mask.meta["val"].dtype == torch.bool:
            unseen = call(graph, node, _ATEN.logical_not.default, (mask,), mask.meta["val"])
            scores = call(graph, node, _ATEN.masked_fill.Scalar, (scores, unseen, float("-inf")), product)
        elif isinstance(mask, Node):
            scores = call(graph, node, _ATEN.add.Tensor, (scores, mask), product)
        probabilities = call(graph, node, _SOFTMAX, (scores, -1), product)
        result = call(graph, node, _ATEN.matmul.default, (probabilities, v), product @ values[2])
        if node.meta["val"].dtype != torch.float32:
            result = call(graph, node, _ATEN.to.dtype, (result, node.meta["val"].dtype), node.meta["val"])
    node.replace_all_uses_with(result)
    graph.graph.erase_node(node)
    return True


def attention_products(graph: GraphModule) -> list[AttentionProducts]:
    """Every attention that :func:`split_attention` has split, in the order of the graph."""
    found = []
    for node in graph.graph.nodes:
        if node.target is _SOFTMAX:
            (result,) = (user for user in node.users if user.target is _ATEN.matmul.default)
            scores = node.args[0]
            while scores.target is not _ATEN.matmul.default:
                scores = scores.args[0]
            q, turned = scores.args
            k, v = turned.args[0], result.args[1]
            edges = [_edge(q, scores), _edge(k, turned), _edge(v, result)]
            joined = edges[1][0]
            apart = joined.target is _ATEN.cat.default and joined.all_input_nodes[0].args[1:] == (-2, 0, 1)
            if apart:
                edges[1] = (joined.all_input_nodes[1], joined)
            found.append(AttentionProducts(result, node, scores, tuple(edges), apart))
    return found


def _edge(source: Node, reader: Node) -> tuple[Node, Node]:
    """The value before a cast to float32, and the cast; or ``source`` and its reader."""
    is_cast = source.target is _ATEN.to.dtype and source.args[1] == torch.float32
    return (source.args[0], source) if is_cast else (source, reader)  # type: ignore[return-value]
