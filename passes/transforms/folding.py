"""Where a scale of a linear's input channels can go instead: into the parameters that the input's channels come from."""

from collections.abc import Collection

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fp4dit_ao._compat import Arguments

_ATEN = torch.ops.aten
_CASTS = (_ATEN.to.dtype, _ATEN.to.dtype_layout, _ATEN._to_copy.default)
_SAME = (*_CASTS, _ATEN.dropout.default, _ATEN.clone.default, _ATEN.contiguous.default, _ATEN.alias.default)
_RESHAPES = (
    _ATEN.view.default, _ATEN.reshape.default, _ATEN._unsafe_view.default, _ATEN.flatten.using_ints, _ATEN.unflatten.int,
)  # fmt: skip


def foldable_parameters(graph: GraphModule, source: Node, readers: Collection[Node]) -> list[str]:
    """The parameters whose entries along dimension 0 all multiply by a channel of ``source``; none if there are none such.

    These are the weight and bias of a LayerNorm, the weight of an RMSNorm, or those of the value projection whose heads an
    attention averages (attention is linear in each channel of its values). Multiplying them by a vector multiplies ``source``
    by it, channel by channel, exactly but for rounding, and changes nothing else: nothing but ``readers`` reads ``source``.

    Args:
        graph: of the node.
        source: ``(…, channels)``.
        readers: the linears that read it.
    """
    if set(source.users) - set(readers):
        return []
    node = _unchanged(source)
    if node is not None:
        node = _values_of_attention(node) or node
    nodes = _factors(node) if node is not None else []
    channels = source.meta["val"].shape[-1]
    names = [_parameter(graph, x, channels) for x in nodes]
    return [name for name in names if name] if names and all(names) else []


def _unchanged(node: object) -> Node | None:
    """The node that ``node`` has its values from, through casts and copies that nothing else reads."""
    while isinstance(node, Node) and node.target in _SAME:
        node = node.args[0]
        if not isinstance(node, Node) or len(node.users) != 1:
            return None
    return node if isinstance(node, Node) else None


def _only(node: object) -> Node | None:
    """``node`` without casts and copies, if it and they have one reader each."""
    return _unchanged(node) if isinstance(node, Node) and len(node.users) == 1 else None


def _values_of_attention(merged: Node) -> Node | None:
    """The value projection whose output channels are, head by head, those of ``merged``, the joined heads of an attention."""
    if merged.target not in _RESHAPES:
        return None
    swapped = _only(merged.args[0])
    if swapped is None or not _swaps_heads(swapped) or not _joins(swapped, merged):
        return None
    attention = _only(swapped.args[0])
    if attention is None or attention.target is not _ATEN.scaled_dot_product_attention.default:
        return None
    if attention.kwargs.get("enable_gqa"):
        return None
    values = _only(attention.args[2])
    if values is None or not _swaps_heads(values):
        return None
    split = _only(values.args[0])
    if split is None or split.target not in _RESHAPES:
        return None
    projected = _only(split.args[0])
    if projected is None or projected.target is not _ATEN.linear.default or not _joins(split, projected):
        return None
    return projected if _heads(split) == _heads(swapped) else None


def _swaps_heads(node: Node) -> bool:
    """Whether a node exchanges the middle two of four dimensions: tokens and heads."""
    if node.meta["val"].ndim != 4:
        return False
    if node.target is _ATEN.transpose.int:
        return {int(dim) % 4 for dim in node.args[1:3]} == {1, 2}  # type: ignore[arg-type]
    return node.target is _ATEN.permute.default and list(node.args[1]) == [0, 2, 1, 3]  # type: ignore[arg-type]


def _heads(node: Node) -> list[int | torch.SymInt]:
    return list(node.meta["val"].shape[-2:])


def _joins(split: Node, whole: Node) -> bool:
    """Whether the last two dimensions of ``split`` are the last one of ``whole``."""
    sizes, channels = _heads(split), whole.meta["val"].shape[-1]
    known = all(isinstance(size, int) for size in (*sizes, channels))
    return known and sizes[0] * sizes[1] == channels and split.meta["val"].ndim == whole.meta["val"].ndim + 1


def _factors(node: Node) -> list[Node]:
    """The nodes of what multiplies each channel of ``node``, or is added to it."""
    arguments: Arguments = node.args
    if node.target is _ATEN.linear.default:
        return [x for x in arguments[1:3] if x is not None]
    if node.target is _ATEN.layer_norm.default and len(arguments[1]) == 1:
        weight, bias = (*arguments[2:4], None, None)[:2]
        return [] if weight is None else [weight] if bias is None else [weight, bias]
    if node.target is _ATEN.rms_norm.default and len(arguments[1]) == 1:
        return [x for x in arguments[2:3] if x is not None]
    if node.target is _ATEN.mul.Tensor:  # an RMSNorm, written out
        return [x for x in arguments if isinstance(x, Node) and _stored(x) is not None][:1]
    return []


def _stored(node: Node) -> Node | None:
    """The ``get_attr`` of a stored tensor that ``node`` is, perhaps in another type, if nothing else reads it."""
    while node.target in _CASTS and len(node.users) == 1:
        node = node.args[0]  # type: ignore[assignment]
    return node if node.op == "get_attr" and len(node.users) == 1 else None


def _parameter(graph: GraphModule, node: object, channels: int | torch.SymInt) -> str | None:
    """Name of the parameter ``(channels, …)`` that ``node`` stands for; None if it is no such, or is used elsewhere, too."""
    found = _stored(node) if isinstance(node, Node) else None
    if found is None:
        return None
    path = str(found.target)
    owner, _, leaf = path.rpartition(".")
    tensor = getattr(graph.get_submodule(owner), leaf)
    uses = sum(other.op == "get_attr" and other.target == found.target for other in graph.graph.nodes)
    tied = sum(x is tensor for _, x in graph.named_parameters(remove_duplicate=False)) > 1
    fits = isinstance(tensor, nn.Parameter) and tensor.shape[:1] == (channels,) and tensor.is_floating_point()
    return path if fits and uses == 1 and not tied else None
