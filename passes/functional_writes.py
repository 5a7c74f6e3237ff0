"""Replaces in-place slice writes by ``slice_scatter``, so that gradients of the overwritten values are right."""

import torch
from torch.fx import GraphModule, Node

from fp4dit_ao import _compat

_ATEN = torch.ops.aten


def make_functional(model: GraphModule) -> None:
    """Rewrites ``x[:, :, a:b] = y`` (``aten.copy_`` into slices of ``x``) to ``x = slice_scatter(x, y, …)``, in place.

    Writes into an input or a parameter stay, and those that another view of ``x`` reads later.
    """
    for node in [node for node in model.graph.nodes if node.target is _ATEN.copy_.default]:
        slices = _slices(node.args[0])
        base = slices[-1].args[0] if slices else None
        if isinstance(base, Node) and _is_fresh(base) and _fits(node) and not _seen_otherwise(base, node):
            _scatter(model, node, slices, base)
    model.graph.eliminate_dead_code()
    model.recompile()


def _slices(view: object) -> list[Node]:
    """Chain of slices that ends in ``view``, innermost first."""
    found = []
    while isinstance(view, Node) and view.target is _ATEN.slice.Tensor:
        found.append(view)
        view = view.args[0]
    return found


def _is_fresh(node: Node) -> bool:
    """Whether ``node`` is the result of an operator that allocates it."""
    return node.op == "call_function" and not _compat.is_view(node.target)


def _fits(copy: Node) -> bool:
    """Whether shapes and types of both sides agree, so that the copy neither broadcasts nor casts."""
    into, what = (x.meta.get("val") if isinstance(x, Node) else None for x in copy.args[:2])
    if not isinstance(into, torch.Tensor) or not isinstance(what, torch.Tensor):
        return False
    return str(into.shape) == str(what.shape) and into.dtype == what.dtype


def _seen_otherwise(base: Node, copy: Node) -> bool:
    """Whether a view of ``base`` that was made before ``copy`` is read after it."""
    order = {node: position for position, node in enumerate(copy.graph.nodes)}
    views = [user for user in base.users if _compat.is_view(user.target) and order[user] < order[copy]]
    while views:
        view = views.pop()
        for user in view.users:
            if order[user] > order[copy]:
                return True
            if _compat.is_view(user.target):
                views.append(user)
    return False


def _scatter(model: GraphModule, copy: Node, slices: list[Node], base: Node) -> None:
    order = {node: position for position, node in enumerate(model.graph.nodes)}
    later = [user for user in base.users if order[user] > order[copy]]
    value = copy.args[1]
    assert isinstance(value, Node)  # _fits has seen its type
    with model.graph.inserting_before(copy):
        for piece in slices:
            whole = piece.args[0]
            assert isinstance(whole, Node)
            value = model.graph.call_function(_ATEN.slice_scatter.default, (whole, value, *piece.args[1:]))
            value.meta.update(whole.meta)
    for user in later:
        user.replace_input_with(base, value)
    model.graph.erase_node(copy)
