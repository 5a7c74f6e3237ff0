"""Biases of quantized linears: which there are, and how a graph is given others."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fp4dit_ao.passes.partition import weight_observers


def own_biases(prepared: GraphModule) -> dict[str, nn.Parameter]:
    """Biases of quantized linears by name, of those that one linear alone reads."""
    readers: dict[str, list[Node]] = {}
    for node in prepared.graph.nodes:
        if node.op == "get_attr":
            readers.setdefault(str(node.target), []).extend(node.users)
    found = {}
    for node, _ in weight_observers(prepared):
        for linear in node.users:
            bias = bias_of(linear)
            if bias is not None and readers[bias] == [linear]:
                found[bias] = prepared.get_parameter(bias)
    return found


def bias_of(node: Node) -> str | None:
    """Name of the bias that a linear adds; None for other nodes, and without one."""
    bias = node.args[2] if node.target is torch.ops.aten.linear.default and len(node.args) > 2 else None
    return str(bias.target) if isinstance(bias, Node) and bias.op == "get_attr" else None


def put_biases(graph: GraphModule, biases: Mapping[str, nn.Parameter]) -> None:
    """Gives the graph other parameters of these names: the old ones may be those of the model that was captured."""
    for name, bias in biases.items():
        owner, _, leaf = name.rpartition(".")
        setattr(graph.get_submodule(owner), leaf, bias)


@contextlib.contextmanager
def trainable_copies(graph: GraphModule, biases: Mapping[str, nn.Parameter]) -> Iterator[dict[str, nn.Parameter]]:
    """Gives the graph copies of these parameters that require gradients. They stay, but not after an error."""
    copies = {name: nn.Parameter(bias.detach().clone()) for name, bias in biases.items()}
    put_biases(graph, copies)
    try:
        yield copies
    except BaseException:
        put_biases(graph, biases)
        raise
