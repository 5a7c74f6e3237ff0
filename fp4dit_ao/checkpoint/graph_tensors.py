"""Tensors of a quantized graph or model by name: reading them, splitting them into plain tensors, putting them back."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchao.utils import TorchAOBaseTensor

from fp4dit_ao import _compat


def state_of(graph: GraphModule) -> dict[str, Tensor]:
    """Tensors that the graph reads, by name: parameters, buffers and constants."""
    names = dict.fromkeys(str(node.target) for node in graph.graph.nodes if node.op == "get_attr")
    return {name: value for name in names if isinstance(value := tensor_at(graph, name), Tensor)}


def static_scales(graph: GraphModule) -> set[str]:
    """Names of the scales of static ranges, which are float32 whatever the model's type."""
    target = torch.ops.fp4dit_ao.fake_quantize.default
    scales = (node.args[2] for node in graph.graph.nodes if node.target is target)
    return {str(scale.target) for scale in scales if isinstance(scale, Node) and scale.op == "get_attr"}


def flatten(name: str, x: Tensor) -> dict[str, Tensor]:
    """Plain tensors that ``x`` consists of, by name: ``x`` itself, or ``name.qdata``, ``name.scale`` and so on."""
    if not isinstance(x, TorchAOBaseTensor):
        return {name: x}
    parts = {part: getattr(x, part) for part in _compat.parts(type(x))}
    return {f"{name}.{part}": value for part, value in parts.items() if isinstance(value, Tensor)}


def fill(graph: GraphModule, stored: Mapping[str, Tensor]) -> None:
    """Replaces the fake tensors of ``graph`` by stored ones, in place.

    Args:
        graph: a graph from ``graph_rebuilding.build``.
        stored: plain tensors, named by :func:`flatten`.

    Raises:
        ValueError: a tensor is missing, left over, or has another shape or type than the graph's.
    """
    places = state_of(graph)
    expected = {part: y for name, x in places.items() for part, y in flatten(name, x).items()}
    missing, unknown = sorted(set(expected) - set(stored)), sorted(set(stored) - set(expected))
    if missing or unknown:
        wrong = f"lacks {missing[0]}" if missing else f"holds {unknown[0]}, which the model does not have"
        raise ValueError(f"it {wrong} ({len(missing)} missing and {len(unknown)} unknown tensors)")
    for part, y in expected.items():
        found = stored[part]
        if found.shape != y.shape or found.dtype != y.dtype:
            raise ValueError(
                f"{part} is {tuple(found.shape)} of {found.dtype}, where the model has {tuple(y.shape)} of {y.dtype}"
            )
    for name, x in places.items():
        value = stored.get(name)
        if isinstance(x, TorchAOBaseTensor):
            value = type(x)(*(stored.get(f"{name}.{part}", getattr(x, part)) for part in _compat.parts(type(x))))
        assert value is not None
        put_tensor(graph, name, value)


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) for every parameter and buffer of a model."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def tensor_at(root: nn.Module, path: str) -> Tensor:
    """Parameter or buffer of ``root`` at a dotted path."""
    parent, _, leaf = path.rpartition(".")
    found: Tensor = getattr(root.get_submodule(parent), leaf)
    return found


def put_tensor(root: nn.Module, path: str, value: Tensor) -> None:
    """Replaces the parameter or buffer of ``root`` at a dotted path by ``value``."""
    parent, _, leaf = path.rpartition(".")
    owner = root.get_submodule(parent)
    parameters, buffers = _compat.slots(owner)
    if leaf in parameters:
        parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        buffers[leaf] = value
