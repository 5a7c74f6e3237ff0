"""The original drawn in another way that ought to give the same images: how far numbers vary that mean nothing."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class OtherWay:
    """One way of drawing the same.

    Attributes:
        label: row of the table; ``{batch}`` is the batch size.
        batch: the batch size, given the usual one and the number of images.
        around: context in which the pipeline draws.
    """

    label: str
    batch: Callable[[int, int], int] = lambda batch_size, images: batch_size
    around: Callable[["DiffusionPipeline"], AbstractContextManager[object]] = lambda pipe: contextlib.nullcontext()


def _half(batch_size: int, images: int) -> int:
    used = min(batch_size, images)
    return used // 2 if used > 1 else 2


def _compiled(pipe: "DiffusionPipeline") -> AbstractContextManager[object]:
    pipe.transformer.compile()
    return contextlib.nullcontext()


OTHER_WAYS = {
    "batch": OtherWay("batch size {batch}", batch=_half),
    "compiled": OtherWay("compiled", around=_compiled),
    "kernel": OtherWay("plain attention kernel", around=lambda pipe: sdpa_kernel(SDPBackend.MATH)),
}
"""Ways to draw the original once more, by name: half the batch size; under ``torch.compile``; attention by PyTorch's plain
kernel instead of the default one."""


def other_way(name: str) -> OtherWay:
    """The entry of :data:`OTHER_WAYS` with that name.

    Raises:
        ValueError: there is none.
    """
    if name not in OTHER_WAYS:
        raise ValueError(f"unknown --baseline {name!r}; choose one of {', '.join(OTHER_WAYS)}, or none")
    return OTHER_WAYS[name]
