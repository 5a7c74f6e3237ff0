"""Products of a graph: which are linears, attention, convolutions or something else, and what they are called.

Names are those of the modules that own a product's weight, or that it was traced in.
"""

from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from torch import nn
from torch.fx import GraphModule, Node

Stored = TypeVar("Stored")
_ATEN = torch.ops.aten
CONVOLUTIONS = (_ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.conv2d.padding, _ATEN.conv3d.default)
DECOMPOSED = (_ATEN.addmm.default, _ATEN.mm.default)
"""Products that ``run_decompositions`` makes of linears."""
_PRODUCTS = (_ATEN.matmul.default, _ATEN.bmm.default, _ATEN.einsum.default)
_VIEWS = (
    _ATEN.t.default, _ATEN.transpose.int, _ATEN.permute.default, _ATEN.numpy_T.default, _ATEN.mT.default, _ATEN.select.int,
    _ATEN.to.dtype, _ATEN.to.dtype_layout, _ATEN.clone.default, _ATEN.contiguous.default,
)  # fmt: skip
"""Operators that may stand between a stored tensor and its product."""
_SOFTMAX = (_ATEN.softmax.int, _ATEN._softmax.default, _ATEN._safe_softmax.default)
TRANSPARENT = (
    _ATEN.dropout.default, _ATEN.to.dtype, _ATEN.to.dtype_layout, _ATEN.clone.default, _ATEN.contiguous.default,
    _ATEN.view.default, _ATEN.reshape.default, _ATEN.chunk.default, _ATEN.split.Tensor, _ATEN.slice.Tensor,
)  # fmt: skip
"""Operators that compute nothing of their own."""
EXPERTS = "one tensor holds the weights of all its experts"
"""Why a mixture of experts is left in high precision that keeps no linear for each."""
MATRIX = "a product with a stored matrix; call torch.nn.functional.linear to have it quantized"
"""Why a product with a parameter is left in high precision."""


def named_products(model: GraphModule) -> Iterator[Node]:
    """The nodes that get a decision."""
    kinds = (_ATEN.linear.default, _ATEN.scaled_dot_product_attention.default, *CONVOLUTIONS)
    for node in model.graph.nodes:
        if node.target in kinds or stored_operand(node) is not None or is_other_attention(node):
            yield node


def stored_operand(node: Node) -> tuple[str, str] | None:
    """Name of what a node that is no linear multiplies with, and why that is not quantized; None if it is not stored.

    Weights of several experts, (experts, in, out), have the name of their module; a parameter of two dimensions that of its
    module if it is called ``weight``, else its own.
    """
    for source in node.all_input_nodes if node.target in (*_PRODUCTS, *DECOMPOSED) else ():
        while source.target in _VIEWS:
            source = source.all_input_nodes[0]
        if source.op != "get_attr":
            continue
        owner, _, leaf = str(source.target).rpartition(".")
        ndim = source.meta["val"].ndim
        if ndim == 3:
            return owner or leaf, EXPERTS
        if ndim == 2 and isinstance(_parameter(source), nn.Parameter):
            return owner if owner and leaf == "weight" else str(source.target), MATRIX
    return None


def _parameter(node: Node) -> object:
    """Tensor that a ``get_attr`` node reads; None if its graph has no module."""
    found: object = node.graph.owning_module
    for part in str(node.target).split("."):
        found = getattr(found, part, None)
    return found


def is_other_attention(node: Node) -> bool:
    """Whether a node multiplies two computed tensors (batch, …, rows, columns), as linear attention does."""
    if node.target not in _PRODUCTS or (
        node.target is _ATEN.einsum.default and not _is_matrix_product(str(node.args[0]))
    ):
        return False
    values = [source.meta["val"] for source in node.all_input_nodes if source.op == "call_function"]
    return len(values) == 2 and all(x.ndim >= 3 and x.is_floating_point() for x in values)


def _is_matrix_product(equation: str) -> bool:
    """Whether an ``einsum`` of two tensors gives each a dimension of its own in the result, as ``bqd,bkd->bqk`` does."""
    operands, _, result = equation.replace(" ", "").partition("->")
    left, _, right = operands.partition(",")
    return bool(set(result) & (set(left) - set(right))) and bool(set(result) & (set(right) - set(left)))


def why_other(node: Node) -> str:
    """Why q, k and v of a product of two computed tensors stay as they are."""
    if any(_follows_softmax(source) for source in node.all_input_nodes):
        return "its softmax stands between separate products; call scaled_dot_product_attention to have q, k and v quantized"
    return "its products are no softmax attention"


def _follows_softmax(node: Node) -> bool:
    """Whether a value is a softmax, or one behind nothing but casts, views and dropout."""
    while node.target in TRANSPARENT and isinstance(node.args[0], Node):
        node = node.args[0]
    return node.target in _SOFTMAX


def _stack(node: Node) -> list[tuple[str, str | type]]:
    return list(node.meta.get("nn_module_stack", {}).values())


def module_name(node: Node) -> str:
    """Name of the innermost module that the node was traced in."""
    stack = _stack(node)
    return (stack[-1][0] if stack else "") or node.name


def linear_name(node: Node) -> str:
    """Name of the module that owns the node's weight; unlike the module stack it survives weight sharing. A weight that is not
    called ``weight`` has its own name, since its module may have several."""
    if (stored := stored_operand(node)) is not None:
        return stored[0]
    weight = node.args[1]
    if isinstance(weight, Node) and weight.op == "get_attr":
        owner, _, leaf = str(weight.target).rpartition(".")
        return owner if owner and leaf == "weight" else str(weight.target)
    return module_name(node)


def weight_named(tensors: Mapping[str, Stored], name: str) -> Stored | None:
    """Weight of the linear that :func:`linear_name` calls ``name``; None if it is not among ``tensors``, by their paths."""
    return tensors.get(f"{name}.weight", tensors.get(name))


def owner_name(node: Node) -> str:
    """Name of the module that owns the weight of a node; ``""`` at the root, and for a weight that is computed."""
    weight = node.args[1] if len(node.args) > 1 else None
    return str(weight.target).rpartition(".")[0] if isinstance(weight, Node) and weight.op == "get_attr" else ""


def module_types(node: Node) -> tuple[str, ...]:
    """Qualified type names of every module around the node."""
    return tuple(t if isinstance(t, str) else f"{t.__module__}.{t.__qualname__}" for _, t in _stack(node))
