"""Replaces whole-number arguments of a graph, such as the frames of a video, by lengths of tensors."""

from collections.abc import Collection

import torch
from torch.fx import GraphModule


def numbers_to_lengths(model: GraphModule, names: Collection[str]) -> None:
    """Makes ``model`` take tensors of shape ``(n, 0)`` instead of whole numbers ``n``, in place.

    ``torch.export`` keeps both symbolic, AOTInductor only the sizes of tensors.

    Args:
        model: a captured graph.
        names: names of the placeholders for whole numbers.
    """
    placeholders = [node for node in model.graph.nodes if node.op == "placeholder"]
    for node in placeholders:
        if node.name in names:
            with model.graph.inserting_after(placeholders[-1]):
                length = model.graph.call_function(torch.ops.aten.sym_size.int, (node, 0))
            node.replace_all_uses_with(length, delete_user_cb=lambda user, length=length: user is not length)
    model.graph.lint()
    model.recompile()
