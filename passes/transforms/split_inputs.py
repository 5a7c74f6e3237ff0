"""``linear(cat([a, b]))`` as ``linear(a) + linear(b)``, so that each part is quantized with scales of its own."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

_ATEN = torch.ops.aten
_FEATURE_WISE = (
    _ATEN.layer_norm.default, _ATEN.rms_norm.default, _ATEN.to.dtype, _ATEN.to.dtype_layout, _ATEN.dropout.default,
    _ATEN.clone.default, _ATEN.contiguous.default,
)  # fmt: skip
"""Operators whose output has at each feature what became of the input there."""
_PART = ".part"


def part_name(name: str, index: int) -> str:
    """Name of the ``index``-th part of a linear."""
    return f"{name}{_PART}{index}"


def whole_name(name: str) -> str:
    """Name of the linear that ``name`` is a part of; ``name`` itself if it is none."""
    whole, part, number = name.rpartition(_PART)
    return whole if part and number.isdigit() else name


class SplitLinear(nn.Module):
    """A linear whose input features are split: ``part0(x[..., :a]) + part1(x[..., a:]) + …``.

    Args:
        linear: that it replaces; its parameters are shared.
        sizes: input features of each part.
    """

    def __init__(self, linear: nn.Linear, sizes: Sequence[int]):
        super().__init__()
        self.sizes = list(sizes)
        self.register_parameter("bias", linear.bias)
        for index, (size, weight) in enumerate(zip(sizes, linear.weight.split(self.sizes, 1), strict=True)):
            part = nn.Linear(size, linear.out_features, bias=False, device="meta")
            part.weight = nn.Parameter(weight.detach(), requires_grad=False)
            self.add_module(part_name("", index).removeprefix("."), part)

    def forward(self, x: Tensor) -> Tensor:
        """``(…, in_features)`` to ``(…, out_features)``."""
        first, *others = zip(self.children(), x.split(self.sizes, -1), strict=True)
        weight: Any = first[0].weight
        bias: Any = self.bias
        total = F.linear(first[1], weight, bias)
        for part, piece in others:
            total = total + part(piece)
        return total


def joined_features(node: Node) -> list[int] | None:
    """How many features of each tensor a linear's input joins; None if it joins none, or sizes vary."""
    source: Any = node.args[0]
    while isinstance(source, Node) and source.target in _FEATURE_WISE:
        source = source.args[0]
    if not isinstance(source, Node) or source.target is not _ATEN.cat.default or len(source.args) < 2:
        return None
    parts, dim = source.args[0], source.args[1]
    assert isinstance(parts, list | tuple) and isinstance(dim, int)
    rank = source.meta["val"].ndim
    sizes = [part.meta["val"].shape[-1] for part in parts]  # type: ignore[union-attr]
    features = node.args[0].meta["val"].shape[-1]  # type: ignore[union-attr]
    fits = dim % rank == rank - 1 and len(sizes) > 1 and all(isinstance(size, int) for size in sizes)
    return sizes if fits and sum(sizes) == features else None


def part_sizes(weights: Iterable[tuple[str, Tensor]]) -> dict[str, list[int]]:
    """By the name of every linear that was split: the input features of its parts.

    Args:
        weights: (name, parameter) of a graph.
    """
    sizes: dict[str, dict[str, int]] = {}
    for name, weight in weights:
        part, _, leaf = name.rpartition(".")
        if leaf == "weight" and whole_name(part) != part:
            sizes.setdefault(whole_name(part), {})[part] = weight.shape[-1]
    return {whole: [parts[part_name(whole, i)] for i in range(len(parts))] for whole, parts in sizes.items()}


def split_modules(model: nn.Module, sizes: Mapping[str, Sequence[int]]) -> None:
    """Put a :class:`SplitLinear` in the place of every named linear.

    Raises:
        ValueError: there is no such linear.
    """
    for name, parts in sizes.items():
        parent, _, leaf = name.rpartition(".")
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            linear = None
        if not isinstance(linear, nn.Linear) or linear.in_features != sum(parts):
            raise ValueError(f"{type(model).__name__} has no linear {name} of {sum(parts)} input features")
        setattr(model.get_submodule(parent), leaf, SplitLinear(linear, parts))


def split_linears(model: GraphModule, wanted: Callable[[Node], bool]) -> None:
    """Split every linear that is ``wanted`` and whose input joins tensors along the features, in place.

    A part's weight is a parameter ``….skip_linear.part0.weight``, beside the bias; the whole weight goes.
    """
    changed = False
    for node in list(model.graph.nodes):
        if node.target is _ATEN.linear.default and wanted(node):
            weight, sizes = node.args[1], joined_features(node)
            if sizes is not None and weight.op == "get_attr":
                _split(model, node, sizes)
                changed = True
    if changed:
        model.graph.eliminate_dead_code()
        model.graph.lint()
        model.recompile()


def _split(model: GraphModule, node: Node, sizes: list[int]) -> None:
    source, weight = node.args[0], node.args[1]
    bias = node.args[2] if len(node.args) > 2 else None
    assert isinstance(source, Node) and isinstance(weight, Node)
    owner_name, _, leaf = str(weight.target).rpartition(".")
    owner = model.get_submodule(owner_name)
    whole: nn.Parameter = getattr(owner, leaf)
    total, start = None, 0
    with model.graph.inserting_before(node):
        for index, size in enumerate(sizes):
            stop = start + size
            part = nn.Module()
            part.register_parameter(leaf, nn.Parameter(whole[:, start:stop].detach().clone(), requires_grad=False))
            name = part_name(owner_name, index)
            model.get_submodule(name.rpartition(".")[0]).add_module(name.rpartition(".")[2], part)
            own = model.graph.get_attr(f"{name}.{leaf}")
            own.meta = dict(weight.meta) | {"val": weight.meta["val"][:, start:stop]}
            taken = _call(
                model, node, _ATEN.slice.Tensor, (source, -1, start, stop), source.meta["val"][..., start:stop]
            )
            arguments = (taken, own) if bias is None or total is not None else (taken, own, bias)
            product = _call(model, node, _ATEN.linear.default, arguments, node.meta["val"])
            total = (
                product if total is None else _call(model, node, _ATEN.add.Tensor, (total, product), node.meta["val"])
            )
            start = stop
    assert total is not None
    node.replace_all_uses_with(total)
    model.graph.erase_node(node)
    if not weight.users:
        model.graph.erase_node(weight)
        if not any(n.op == "get_attr" and n.target == weight.target for n in model.graph.nodes):
            delattr(owner, leaf)


def _call(model: GraphModule, like: Node, target: Any, arguments: tuple[Any, ...], value: Any) -> Node:
    node = model.graph.call_function(target, arguments)
    node.meta = dict(like.meta) | {"val": value}
    return node
