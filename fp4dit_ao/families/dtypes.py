"""The float type of a model whose tensors are not all of one type."""

from collections import Counter
from collections.abc import Collection, Iterable

import torch
from torch import Tensor


def main_dtype(tensors: Iterable[tuple[str, Tensor]], kept: Collection[str] = ()) -> torch.dtype:
    """Float type that most elements have; float32 if there is no float tensor.

    Args:
        tensors: name and tensor; a low-bit weight counts by the type that it presents itself as.
        kept: parts of names of tensors that stay float32 whatever the model's type, which count only if there are no others.
    """
    elements: Counter[torch.dtype] = Counter()
    for name, x in tensors:
        if x.is_floating_point():
            elements[x.dtype] += 1 if is_kept(name, kept) else x.numel() << 32
    return max(elements, key=lambda dtype: elements[dtype], default=torch.float32)


def is_kept(name: str, kept: Collection[str]) -> bool:
    """Whether a tensor is one of those that ``kept`` names, as diffusers reads such lists."""
    return not set(kept).isdisjoint(name.split("."))
