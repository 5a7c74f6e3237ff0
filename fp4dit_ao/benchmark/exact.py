"""Errors of products against float64 on the same quantized operands."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4dit_ao.formats import parse
from fp4dit_ao.ops import choose_scale


def token_wise(x: Tensor, fmt: str | None) -> Tensor:
    """Quantizes ``x`` to ``fmt`` with a scale per token and dequantizes it, in float64; returns ``x`` if ``fmt`` is
    None."""
    if fmt is None:
        return x.double()
    scale = choose_scale(x, [1] * (x.ndim - 1) + [-1], fmt, torch.float32)
    return parse(fmt).round(x.float() / scale).double() * scale.double()


def error(x_hat: Tensor, w_hat: Tensor, bias: Tensor | None, got: Tensor) -> float:
    """Largest deviation of ``got`` from the float64 product, relative to the sum of magnitudes of its terms."""
    exact = F.linear(x_hat, w_hat, None if bias is None else bias.double())
    magnitude = F.linear(x_hat.abs(), w_hat.abs(), None if bias is None else bias.double().abs())
    return float(((got.double() - exact).abs() / magnitude.clamp_min(1e-30)).max())


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """L2 norm of ``got - wanted`` relative to that of ``wanted``, in float64."""
    wanted = wanted.double()
    return float((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))
