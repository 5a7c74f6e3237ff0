"""A weight that is trained while it is stored in INT8 alone (Q-GaLore, arXiv 2407.08296): a quarter of a float copy.

Groups of 256 consecutive values share a scale and a zero point. An update is added to the dequantized values and rounded
*stochastically*, up with the probability of the distance to the level below: right in the mean, so that updates far smaller
than a step are not lost.

The authors' code finds scales anew in every step, and so rounds every value of a group at random whenever the largest one
moved. Here a group keeps its scale until a value leaves its range: values that are not updated stay. (A group's range always
holds 0, since its zero point is one of the codes; in the code such groups saturate.)
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

GROUP = 256
"""Values that share a scale, or the largest divisor of it that divides the matrix."""
CODES = 2**8 - 1
"""Largest code."""


class Int8Latent(nn.Module):
    """A float matrix that is stored as codes.

    Args:
        value: float ``(rows, columns)`` to start from, rounded to nearest.

    Attributes:
        codes: uint8, shaped like the matrix.
        scale: float32 ``(groups, 1)``.
        zero: float32 ``(groups, 1)``, the code of 0.
        receive: function that gets the gradient of each backward pass; without one, gradients are dropped.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, value: Tensor):
        super().__init__()
        self._group = math.gcd(value.numel(), GROUP)
        grouped = value.detach().float().reshape(-1, self._group)
        scale, zero = _parameters(grouped)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.register_buffer("codes", _clamped((grouped / scale).round() + zero).reshape(value.shape))
        self.receive: Callable[[Tensor], None] | None = None
        self._handle = torch.zeros((), device=value.device, requires_grad=True)  # what makes autograd come back here

    def forward(self) -> Tensor:
        """The values, float32; their gradient goes to :attr:`receive`, and no float matrix outlives the graph."""
        values: Tensor = _Read.apply(self._handle, self)  # type: ignore[no-untyped-call]
        return values

    def values(self) -> Tensor:
        """The values, float32, without a gradient."""
        return ((self.codes.reshape(-1, self._group).float() - self.zero) * self.scale).reshape(self.codes.shape)

    def add(self, update: Tensor, generator: torch.Generator) -> None:
        """Adds ``update``, shaped like the matrix, by stochastic rounding.

        Args:
            generator: on the matrix's device.
        """
        wanted = (self.values() + update).reshape(-1, self._group)
        position = wanted / self.scale + self.zero
        outside = ((position < 0) | (position > CODES)).any(1, keepdim=True)
        scale, zero = _parameters(wanted)
        self.scale = torch.where(outside, scale, self.scale)
        self.zero = torch.where(outside, zero, self.zero)
        position = wanted / self.scale + self.zero
        floor = position.floor()
        up = torch.rand(position.shape, device=position.device, generator=generator) < position - floor
        self.codes = _clamped(floor + up).reshape(self.codes.shape)


def _parameters(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, zero point) of every row."""
    low, high = grouped.amin(1, keepdim=True).clamp(max=0), grouped.amax(1, keepdim=True).clamp(min=0)
    scale = ((high - low) / CODES).clamp(min=torch.finfo(torch.float32).tiny)
    return scale, (-low / scale).round()


def _clamped(codes: Tensor) -> Tensor:
    return codes.clamp(0, CODES).to(torch.uint8)


class _Read(torch.autograd.Function):
    """The values of a latent, and the way back of their gradient."""

    @staticmethod
    def forward(ctx: Any, handle: Tensor, latent: Int8Latent) -> Tensor:  # type: ignore[override]
        ctx.latent = latent
        return latent.values()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:  # type: ignore[override]
        if ctx.latent.receive is not None:
            ctx.latent.receive(gradient)
        return None, None
