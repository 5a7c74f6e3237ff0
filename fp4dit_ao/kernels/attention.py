"""Attention on quantized q, k and v: int8 products for the scores where the processor has them, else PyTorch's attention."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4dit_ao.formats import parse
from fp4dit_ao.kernels.cpu import native
from fp4dit_ao.kernels.token_quantization import digits, quantize_tokens
from fp4dit_ao.ops import LIBRARY, choose_scale, fake_quantize

_LARGEST_HEAD = 256
_DIGITS = 2


@functools.cache
def available() -> bool:
    """Whether the compiled library and this processor (AVX-512 VNNI) compute attention on int8 levels."""
    opened = native.shared_object()
    return opened is not None and opened.fp4dit_attention_level() > 0


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, fmt: str) -> Tensor:
    """``softmax(q k^T * scale + mask) v`` of q, k and v quantized online, per head and token, to ``fmt``.

    Args:
        q: float ``(batch, heads, queries, dim)``.
        k: ``(batch, heads, keys, dim)``.
        v: ``(batch, heads, keys, dim)``.
        mask: bool (True attends) or float (added), broadcastable to ``(batch, heads, queries, keys)``; or None.
        scale: ``dim ** -0.5`` if None.
        fmt: format of q, k and v.

    Returns:
        ``(batch, heads, queries, dim)`` in the type of ``q``. Scores are exact integers times scales, and weights and sums
        float32; only where the result is bfloat16 (and levels are int8) are weights rounded to bfloat16, as PyTorch's own
        attention does. A query whose keys are all masked gets zeros.
    """
    if not _fits(q, k, v, mask, fmt):
        block = [1] * (q.ndim - 1) + [-1]
        q, k, v = (fake_quantize(x, block, choose_scale(x, block, fmt, torch.float32), fmt, x.dtype) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    bias = None if mask is None else mask.float()
    if mask is not None and mask.dtype == torch.bool:
        bias = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -torch.inf)
    output_dtype = q.dtype if q.dtype in native.OUTPUTS else torch.float32
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    levels = [part for x in (q, k, v) for part in _levels(x, fmt)]  # int8 digits and scales
    y: Tensor = torch.ops.fp4dit_ao.int8_attention(*levels, bias, scale, output_dtype)
    return y.to(q.dtype)


_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def arguments_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any, Any, Any, Any] | None:
    """Query, key, value, mask and scale of a call of ``scaled_dot_product_attention``.

    None if it asks for what :func:`attention` lacks: dropout, a causal mask, or fewer heads of keys than of queries.
    """
    given = dict(zip(_ARGUMENTS, args, strict=False)) | dict(kwargs)
    if any(given.get(name) for name in ("dropout_p", "is_causal", "enable_gqa")):
        return None
    return given["query"], given["key"], given["value"], given.get("attn_mask"), given.get("scale")


def _fits(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, fmt: str) -> bool:
    shaped = q.ndim == k.ndim == v.ndim == 4 and q.shape[:2] == k.shape[:2] == v.shape[:2]
    shaped = shaped and q.shape[-1] == k.shape[-1] == v.shape[-1] <= _LARGEST_HEAD
    number = parse(fmt)
    exact = digits(number) <= _DIGITS and number.lattice_max**2 * q.shape[-1] < 2**31
    return shaped and q.device.type == "cpu" and exact and available()


def _levels(x: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    levels, scale = quantize_tokens(x, fmt)
    return levels.reshape(digits(parse(fmt)), *x.shape), scale.reshape(x.shape[:-1])


def run(
    q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor, bias: Tensor | None, scale: float,
    output_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """``torch.ops.fp4dit_ao.int8_attention`` on CPUs.

    Args:
        q: int8 ``(digits, batch, heads, queries, dim)``, -127 to 127; ``k``, ``v`` likewise with ``keys``. dim is at most
            256. A level is one digit, or 128 times the first plus the second; no score may exceed an int32.
        q_scale: float32 ``(batch, heads, queries)``; ``k_scale``, ``v_scale`` likewise.
        bias: float32, broadcastable to ``(batch, heads, queries, keys)``, or None.
        scale: of the scores.
        output_dtype: float32, bfloat16 or float16.

    Returns:
        ``(batch, heads, queries, dim)``, laid out as ``(batch, queries, heads, dim)``.

    Raises:
        ValueError: shapes or types do not fit.
        RuntimeError: no library, an instruction set that the processor lacks, or no memory.
    """
    opened = native.shared_object()
    if opened is None:
        raise RuntimeError("fp4dit_ao was installed without its compiled kernel; install a C compiler and reinstall it")
    count, batch, heads, queries, dim = q.shape
    keys = k.shape[3]
    fits = (
        k.shape == v.shape == (count, batch, heads, keys, dim)
        and count <= _DIGITS
        and dim <= _LARGEST_HEAD
        and output_dtype in native.OUTPUTS
    )
    fits = fits and {x.dtype for x in (q, k, v)} == {torch.int8}
    fits = fits and q_scale.shape == q.shape[1:4] and k_scale.shape == v_scale.shape == k.shape[1:4]
    if not fits:
        raise ValueError(
            f"int8_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} with scales "
            f"{tuple(q_scale.shape)}, {tuple(k_scale.shape)}, {tuple(v_scale.shape)} to {output_dtype} do not fit; they "
            f"must be int8 (1 or 2, batch, heads, tokens, dim) with dim up to {_LARGEST_HEAD}, and (batch, heads, tokens)"
        )
    arrays = [x.contiguous() for x in (q, k, v)] + [x.float().contiguous() for x in (q_scale, k_scale, v_scale)]
    strides: tuple[int, ...] = (0, 0, 0)
    added = None
    if bias is not None:
        added = bias.float().expand(*bias.shape[:-1], keys).contiguous()
        strides = added.expand(batch, heads, queries, keys).stride()[:3]
    out = torch.empty((batch, queries, heads, dim), dtype=output_dtype)
    failed = opened.fp4dit_attention(
        *(array.data_ptr() for array in arrays), None if added is None else added.data_ptr(), out.data_ptr(),
        count, batch, heads, queries, keys, dim, *strides, scale, native.OUTPUTS[output_dtype], output_dtype == torch.bfloat16,
        native.parallel(), torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise RuntimeError(f"int8_attention: {('out of memory', 'needs AVX-512 VNNI')[failed - 1]}")
    return out.transpose(1, 2)


LIBRARY.define(
    "int8_attention(Tensor q, Tensor q_scale, Tensor k, Tensor k_scale, Tensor v, Tensor v_scale, Tensor? bias, "
    "float scale, ScalarType output_dtype) -> Tensor"
)
LIBRARY.impl("int8_attention", run, "CPU")
LIBRARY.impl(
    "int8_attention",
    lambda q, q_scale, k, k_scale, v, v_scale, bias, scale, output_dtype: q.new_empty(
        (q.shape[1], q.shape[3], q.shape[2], q.shape[4]), dtype=output_dtype
    ).transpose(1, 2),
    "Meta",
)
LIBRARY.define("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float? scale, str fmt) -> Tensor")
LIBRARY.impl("attention", attention, "CompositeImplicitAutograd")
