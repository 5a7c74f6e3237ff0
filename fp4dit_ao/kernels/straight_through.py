"""Gradients through low-bit linears and attention, for what is trained around them, such as a LoRA.

Low-bit operands are constants. Rounding an input counts as the identity (the straight-through estimator, arXiv 1308.3432), so
that the gradient of ``x @ W^T`` is ``g @ W`` with the weight's stored values.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class StoredWeight(Protocol):
    """A low-bit weight ``(out_features, in_features)``."""

    def stored_linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ W^T + bias`` with ``x`` quantized as the weight says."""

    def stored_values(self, output_dtype: torch.dtype) -> Tensor:
        """The weight's values."""


def linear(x: Tensor, weight: StoredWeight, bias: Tensor | None) -> Tensor:
    """``weight.stored_linear(x, bias)``, which a gradient passes."""
    if not _wanted(x, bias):
        return weight.stored_linear(x, bias)
    y: Tensor = _Linear.apply(x, bias, weight)  # type: ignore[no-untyped-call]
    return y


def attention(
    unit: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    rounded: Callable[[Tensor, str], Tensor],
    fmt: str,
) -> Tensor:
    """``unit(q, k, v, mask, scale, fmt)``, which a gradient passes: that of attention on ``rounded(q, fmt)`` and so on."""
    if not _wanted(q, k, v, mask):
        return unit(q, k, v, mask, scale, fmt)
    y: Tensor = _Attention.apply(q, k, v, mask, scale, fmt, unit, rounded)  # type: ignore[no-untyped-call]
    return y


def _wanted(*inputs: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: StoredWeight) -> Tensor:  # type: ignore[override]
        ctx.weight, ctx.dtypes = weight, (x.dtype, None if bias is None else bias.dtype)
        return weight.stored_linear(x, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = (gradient @ ctx.weight.stored_values(gradient.dtype)).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0).to(ctx.dtypes[1])
        return of_x, of_bias, None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float | None,
        fmt: str,
        unit: Callable[..., Tensor],
        rounded: Callable[[Tensor, str], Tensor],
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale, ctx.fmt, ctx.rounded = scale, fmt, rounded
        return unit(q, k, v, mask, scale, fmt)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *inputs, mask = ctx.saved_tensors
        with torch.enable_grad():
            q, k, v = (ctx.rounded(x.detach(), ctx.fmt).requires_grad_() for x in inputs)
            if wanted := mask is not None and ctx.needs_input_grad[3]:
                mask = mask.detach().requires_grad_()
            y = F.scaled_dot_product_attention(q, k, v, mask, scale=ctx.scale)
            found = torch.autograd.grad(y, [q, k, v, mask] if wanted else [q, k, v], gradient)
        return *found, *(() if wanted else (None,)), None, None, None, None
