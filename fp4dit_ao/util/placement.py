"""Moving nested containers of tensors between devices."""

from typing import TypeVar

import torch
from torch import Tensor

from fp4dit_ao._compat import pytree

T = TypeVar("T")


def on_device(tree: T, device: torch.device | str) -> T:
    """``tree`` with all its tensors on ``device``; one that stands in several places is moved once."""
    moved: dict[int, Tensor] = {}

    def move(x: Tensor) -> Tensor:
        if id(x) not in moved:
            moved[id(x)] = x.to(device)
        return moved[id(x)]

    return pytree.tree_map_only(Tensor, move, tree)
