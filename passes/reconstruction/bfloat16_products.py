"""Products in bfloat16 inside of a float32 graph: what mixed precision means while a rounding is learned.

Linears and attentions, which are nearly all of a block's arithmetic, take bfloat16 and give float32 again; norms, activation
functions, the rounding of tokens and the residual stream stay in float32. So do the learned variables.
"""

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fp4dit_ao._compat import Operator

_ATEN = torch.ops.aten
PRODUCTS = frozenset({_ATEN.linear.default, _ATEN.scaled_dot_product_attention.default})
"""Operators that multiply."""


def with_bfloat16_products(model: GraphModule) -> GraphModule:
    """A graph that computes the same with every product of float32 numbers in bfloat16, sums in float32.

    Args:
        model: it is not changed; modules and parameters are shared.
    """
    graph, copies = Graph(), dict[Node, Node]()
    for node in model.graph.nodes:
        copies[node] = copy = graph.node_copy(node, copies.__getitem__)
        if node.op == "call_function" and node.target in PRODUCTS:
            copy.args, copy.target = (node.target, *copy.args), in_bfloat16
    return GraphModule(model, graph)


def in_bfloat16(product: Operator, x: Tensor, *arguments: object, **options: object) -> Tensor:
    """``product(x, *arguments)``, computed in bfloat16 and given as float32, if ``x`` is float32."""
    if x.dtype != torch.float32:
        result: Tensor = product(x, *arguments, **options)
        return result
    named = {name: _lowered(value) for name, value in options.items()}
    result = product(_lowered(x), *map(_lowered, arguments), **named)
    return result.float()


def multiplies_alone(node: Node) -> bool:
    """Whether the node's value goes nowhere but into products, so that it may be made in bfloat16 at once."""
    return all(user.target in PRODUCTS for user in node.users)


def _lowered(value: object) -> object:
    return value.to(torch.bfloat16) if isinstance(value, Tensor) and value.is_floating_point() else value
