"""Attention on quantized q, k and v: products of bytes for the scores where they are faster, else PyTorch's attention."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4dit_ao.formats import NumberFormat, parse
from fp4dit_ao.kernels import attention_backend, flop_counts, fp8_attention, straight_through
from fp4dit_ao.kernels.attention_backend import AttentionShape
from fp4dit_ao.kernels.checks import refuse
from fp4dit_ao.kernels.cpu import native
from fp4dit_ao.kernels.token_quantization import digits, quantize_tokens
from fp4dit_ao.kernels.units import Unit, UnitTable
from fp4dit_ao.ops import LIBRARY, choose_scale, fake_quantize

LARGEST_HEAD = 256
"""Most features of a head that the compiled kernel takes."""
_MOST_DIGITS = 2
"""Most int8 digits of a level that it takes."""
_LARGEST_SCORE = 2**31 - 1
"""What an int32 score holds."""


@functools.cache
def kernels() -> dict[str, int]:
    """Instruction sets that this processor has for attention on int8 levels, best first, with the library's number for each.

    ``"amx"`` computes bfloat16 results of levels of one digit; ``"avx512vnni"`` all.
    """
    opened = native.shared_object()
    return {} if opened is None else native.instruction_sets(opened.fp4dit_attention_kernel)


class AttentionOperands(NamedTuple):
    """What decides how attention is computed.

    Attributes:
        fmt: format of q, k and v.
        device: of all three.
        head_dim: features of a head.
        separate: whether all three are ``(batch, heads, tokens, head_dim)`` with the same batch and heads.
        shape: sizes and types on a GPU; None where they are not known.
    """

    fmt: NumberFormat
    device: torch.device
    head_dim: int
    separate: bool = True
    shape: AttentionShape | None = None


def _kernel_supports(o: AttentionOperands) -> bool:
    exact = digits(o.fmt) <= _MOST_DIGITS and o.fmt.lattice_max**2 * o.head_dim <= _LARGEST_SCORE
    return o.separate and o.head_dim <= LARGEST_HEAD and o.device.type == "cpu" and exact and bool(kernels())


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
    separate = q.ndim == k.ndim == v.ndim == 4 and q.shape[:2] == k.shape[:2] == v.shape[:2]
    separate = separate and q.shape[-1] == k.shape[-1] == v.shape[-1]
    shape = attention_backend.shape_of(q, k, mask)
    unit = ATTENTION.pick(AttentionOperands(parse(fmt), q.device, q.shape[-1], separate, shape))
    return straight_through.attention(unit.run, q, k, v, mask, scale, _rounded, fmt)


def _rounded(x: Tensor, fmt: str) -> Tensor:
    block = [1] * (x.ndim - 1) + [-1]
    return fake_quantize(x, block, choose_scale(x, block, fmt, torch.float32), fmt, x.dtype)


def _on_compiled_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, fmt: str) -> Tensor:
    bias = None if mask is None else mask.float()
    if mask is not None and mask.dtype == torch.bool:
        bias = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -torch.inf)
    output_dtype = q.dtype if q.dtype in native.OUTPUTS else torch.float32
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    levels = [part for x in (q, k, v) for part in _levels(x, fmt)]  # int8 digits and scales
    y: Tensor = torch.ops.fp4dit_ao.int8_attention(*levels, bias, scale, output_dtype)
    return y.to(q.dtype)


def _on_pytorch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, fmt: str) -> Tensor:
    q, k, v = (_rounded(x, fmt) for x in (q, k, v))
    with attention_backend.preferred(q, k, mask):
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)


def _on_fp8(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, fmt: str) -> Tensor:
    return fp8_attention.attention(q, k, _rounded(v, fmt), scale, fmt)


ATTENTION: UnitTable[AttentionOperands] = UnitTable(
    "attention",
    [
        Unit("int8 scores, compiled kernel", _kernel_supports, _on_compiled_kernel, lambda: " or ".join(kernels())),
        Unit("FP8 scores, Triton", lambda o: o.separate and fp8_attention.supports(o.fmt, o.shape), _on_fp8),
        Unit("PyTorch's attention, rounded values", lambda o: True, _on_pytorch),
    ],
)


_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def arguments_of(args: Sequence[object], kwargs: Mapping[str, object]) -> tuple[Any, Any, Any, Any, Any] | None:
    """Query, key, value, mask and scale of a call of ``scaled_dot_product_attention``.

    None if it asks for what :func:`attention` lacks: dropout, a causal mask, or fewer heads of keys than of queries.
    """
    given = dict(zip(_ARGUMENTS, args, strict=False)) | dict(kwargs)
    if any(given.get(name) for name in ("dropout_p", "is_causal", "enable_gqa")):
        return None
    return given["query"], given["key"], given["value"], given.get("attn_mask"), given.get("scale")


def _levels(x: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    levels, scale = quantize_tokens(x, fmt)
    return levels.reshape(digits(parse(fmt)), *x.shape), scale.reshape(x.shape[:-1])


def run(
    q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor, bias: Tensor | None, scale: float,
    output_dtype: torch.dtype, kernel: str | None = None,
) -> Tensor:  # fmt: skip
    """``torch.ops.fp4dit_ao.int8_attention`` on CPUs.

    Args:
        q: int8 ``(digits, batch, heads, queries, dim)``, -127 to 127; ``k``, ``v`` likewise with ``keys``. dim is at most
            256. A level is one digit, or 128 times the first plus the second; no score may exceed an int32.
        q_scale: float32 ``(batch, heads, queries)``; ``k_scale``, ``v_scale`` likewise.
        bias: float32, broadcastable to ``(batch, heads, queries, keys)``, or None.
        scale: factor of the scores.
        output_dtype: float32, bfloat16 or float16.
        kernel: one of :func:`kernels`; None takes the best that computes this. The operator has no such argument.

    Returns:
        ``(batch, heads, queries, dim)``, laid out as ``(batch, queries, heads, dim)``.

    Raises:
        ValueError: an argument does not fit (it says which, what was found and what was expected).
        RuntimeError: no library, no kernel that computes this on this processor, or no memory.
    """
    opened = native.opened_library("int8_attention")
    _check(q, q_scale, k, k_scale, v, v_scale, output_dtype)
    count, batch, heads, queries, dim = q.shape
    keys = k.shape[3]
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
        -1 if kernel is None else kernels()[kernel], native.parallel(), torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        needed = kernel or "AVX-512 VNNI"
        raise RuntimeError(f"int8_attention: {('out of memory', f'{needed} cannot compute this here')[failed - 1]}")
    return out.transpose(1, 2)


def _check(
    q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor, output_dtype: torch.dtype
) -> None:
    name = "int8_attention"
    for argument, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != torch.int8:
            refuse(name, argument, x.dtype, torch.int8)
        if x.ndim != 5:
            refuse(name, argument, f"shape {tuple(x.shape)}", "(digits, batch, heads, tokens, dim)")
    if not 1 <= q.shape[0] <= _MOST_DIGITS:
        refuse(name, "q", f"{q.shape[0]} digits", f"1 to {_MOST_DIGITS}")
    if q.shape[4] > LARGEST_HEAD:
        refuse(name, "q", f"heads of {q.shape[4]} features", f"at most {LARGEST_HEAD}")
    expected = (*q.shape[:3], k.shape[3], q.shape[4])
    if k.shape != expected:
        refuse(name, "k", f"shape {tuple(k.shape)}", f"{expected}, for q of {tuple(q.shape)}")
    if v.shape != k.shape:
        refuse(name, "v", f"shape {tuple(v.shape)}", f"{tuple(k.shape)}, that of k")
    for argument, x, levels in (("q_scale", q_scale, q), ("k_scale", k_scale, k), ("v_scale", v_scale, v)):
        if x.shape != levels.shape[1:4]:
            refuse(name, argument, f"shape {tuple(x.shape)}", f"{tuple(levels.shape[1:4])}, one for each token")
    if output_dtype not in native.OUTPUTS:
        refuse(name, "output_dtype", output_dtype, f"one of {', '.join(map(str, native.OUTPUTS))}")


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
flop_counts.register("int8_attention", flop_counts.int8_attention)
LIBRARY.define("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float? scale, str fmt) -> Tensor")
LIBRARY.impl("attention", attention, "CompositeImplicitAutograd")
