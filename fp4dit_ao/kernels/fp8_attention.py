"""Attention with FP8 scores on NVIDIA GPUs: the operator, and when it is faster than PyTorch's attention on rounded values.

q and k stay the levels that they are quantized to, which E4M3 holds, so that their product is one of bytes; PyTorch's attention
takes the same values rounded to bfloat16.
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4dit_ao import _compat
from fp4dit_ao.formats import NumberFormat
from fp4dit_ao.kernels import attention_backend, flop_counts
from fp4dit_ao.kernels.attention_backend import AttentionShape
from fp4dit_ao.kernels.cuda import int8_linear as triton_units
from fp4dit_ao.kernels.token_quantization import fits_fp8, fp8_tokens
from fp4dit_ao.ops import LIBRARY

LEAST_HEAD, LARGEST_HEAD = 16, 128
"""Features of a head that the kernel takes."""
_WORTHWHILE = 0.97
"""Part of the best backend's time that the kernel may take, so that noise alone decides nothing."""
_TOLERANCE = 2**-6
"""Largest relative difference from PyTorch's attention, in bfloat16, of a kernel that is taken."""
_FASTER: dict[AttentionShape, bool] = {}
"""Results of :func:`is_faster`."""


def supports(fmt: NumberFormat, shape: AttentionShape | None) -> bool:
    """Whether the kernel computes attention of such q, k and v, and is faster than PyTorch's there.

    Args:
        fmt: format of q, k and v.
        shape: sizes and types; None where they are not known.
    """
    if shape is None or shape.mask is not None or shape.dtype != torch.bfloat16 or not fits_fp8(fmt):
        return False
    dim = shape.query[-1]
    able = triton_units.capability(shape.device) >= triton_units.FP8_CAPABILITY and importlib.util.find_spec("triton")
    return bool(able) and LEAST_HEAD <= dim <= LARGEST_HEAD and dim % 8 == 0 and is_faster(shape)


def is_faster(shape: AttentionShape) -> bool:
    """Whether the kernel takes less time than the best backend, measured once; False while a CUDA graph is captured."""
    if shape not in _FASTER:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return False
        backend = attention_backend.fastest(shape)
        _FASTER[shape] = backend is None or _seconds(shape) < _WORTHWHILE * attention_backend.seconds(backend, shape)
    return _FASTER[shape]


def found() -> dict[AttentionShape, bool]:
    """What :func:`is_faster` has found so far."""
    return dict(_FASTER)


@torch.no_grad()
def _seconds(shape: AttentionShape) -> float:
    """Seconds of one attention by the kernel, on random tensors; infinite if it fails there, or computes something else than
    PyTorch's attention does."""
    batch, heads, queries, dim = shape.query
    with _compat.without_modes():
        q, k, v = (
            torch.randn((batch, tokens, heads, dim), device=shape.device, dtype=shape.dtype)
            for tokens in (queries, shape.keys, shape.keys)
        )
        levels = *_levels(q.transpose(1, 2), "e2m3"), *_levels(k.transpose(1, 2), "e2m3")
        try:
            computed = _on_triton(*levels, v, dim**-0.5)
            seconds = attention_backend.median_seconds(lambda: _on_triton(*levels, v, dim**-0.5), shape.device)
        except RuntimeError:
            return float("inf")
        q, k = (
            (x[..., :dim].float().transpose(1, 2) * scale.unsqueeze(-1)).to(shape.dtype)
            for x, scale in (levels[:2], levels[2:])
        )
        expected = F.scaled_dot_product_attention(q, k, v.transpose(1, 2)).transpose(1, 2)
    agrees = bool((computed.float() - expected.float()).norm() <= _TOLERANCE * expected.float().norm())
    return seconds if agrees else float("inf")


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None, fmt: str) -> Tensor:
    """As :func:`fp4dit_ao.kernels.attention.attention` without a mask; ``v`` is quantized already."""
    levels = *_levels(q, fmt), *_levels(k, fmt)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    y: Tensor = torch.ops.fp4dit_ao.fp8_attention(*levels, v.transpose(1, 2), scale)
    return y.transpose(1, 2)


def _levels(x: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    """Levels and scales of ``(batch, heads, tokens, dim)``: float8_e4m3fn ``(batch, tokens, heads, width)``, zeros past
    ``dim``, and float32 ``(batch, heads, tokens)``."""
    rows = x.transpose(1, 2)
    dim = rows.shape[-1]
    levels, scale = fp8_tokens(F.pad(rows, (0, width(dim) - dim)), fmt)
    return levels.reshape(*rows.shape[:3], -1), scale.reshape(rows.shape[:3]).transpose(1, 2).contiguous()


def width(dim: int) -> int:
    """Features of q and k as the kernel takes them: the power of two from 32 on that holds a head."""
    return max(32, 1 << (dim - 1).bit_length())


def _on_triton(q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, scale: float) -> Tensor:
    """``torch.ops.fp4dit_ao.fp8_attention`` on GPUs: ``softmax((q * q_scale) (k * k_scale)^T * scale) v``.

    Args:
        q: float8_e4m3fn ``(batch, queries, heads, width)``; ``k`` likewise with ``keys``.
        q_scale: float32 ``(batch, heads, queries)``; ``k_scale`` with ``keys``.
        v: bfloat16 or float16 ``(batch, keys, heads, dim)``.
        scale: factor of the scores.

    Returns:
        ``(batch, queries, heads, dim)`` in the type of ``v``.
    """
    from fp4dit_ao.kernels.cuda import triton_attention

    return triton_attention.run(q, q_scale, k, k_scale, v, scale)


def _on_operators(q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, scale: float) -> Tensor:
    """As :func:`_on_triton`, on PyTorch's operators in float32."""
    queries, keys = (x.float().transpose(1, 2) * factor.unsqueeze(-1) for x, factor in ((q, q_scale), (k, k_scale)))
    weights = (queries @ keys.mT * scale).softmax(-1)
    return (weights @ v.float().transpose(1, 2)).transpose(1, 2).to(v.dtype).contiguous()


LIBRARY.define(
    "fp8_attention(Tensor q, Tensor q_scale, Tensor k, Tensor k_scale, Tensor v, float scale) -> Tensor",
    tags=(torch.Tag.flexible_layout,),
)
LIBRARY.impl("fp8_attention", _on_triton, "CUDA")
LIBRARY.impl("fp8_attention", _on_operators, "CPU")
LIBRARY.impl(
    "fp8_attention",
    lambda q, q_scale, k, k_scale, v, scale: v.new_empty((q.shape[0], q.shape[1], q.shape[2], v.shape[3])),
    "Meta",
)
flop_counts.register("fp8_attention", flop_counts.fp8_attention)
