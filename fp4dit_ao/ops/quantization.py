"""``torch.ops.fp4dit_ao.*``: choose a scale, quantize to codes, dequantize, and fake-quantize.

All take torchao's ``block_size``: number of elements along each dimension that share a scale, -1 for a whole dimension.
A scale tensor has the rank of ``x``: ``scale.shape[i] == x.shape[i] // block_size[i]``. They are composites of plain
aten operators, so Inductor fuses them into the operators around them, autograd and fake tensors see through them, and a
backend may still register its own kernel under its dispatch key.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fp4dit_ao.formats import parse
from fp4dit_ao.ops.division import divided
from fp4dit_ao.ops.library import LIBRARY

LIBRARY.define("choose_scale(Tensor x, SymInt[] block_size, str fmt, ScalarType scale_dtype) -> Tensor")
LIBRARY.define("quantize(Tensor x, SymInt[] block_size, Tensor scale, str fmt) -> Tensor")
LIBRARY.define(
    "dequantize(Tensor codes, SymInt[] block_size, Tensor scale, str fmt, ScalarType output_dtype) -> Tensor"
)
LIBRARY.define("fake_quantize(Tensor x, SymInt[] block_size, Tensor scale, str fmt, ScalarType output_dtype) -> Tensor")


def full_block(shape: Sequence[int], block_size: Sequence[int]) -> list[int]:
    """``block_size`` with every -1 replaced by the size of its dimension.

    Raises:
        ValueError: the ranks differ, or a block does not divide its dimension.
    """
    if len(shape) != len(block_size):
        raise ValueError(
            f"block_size {list(block_size)} has {len(block_size)} entries for a tensor of rank {len(shape)}"
        )
    for dim, (size, block) in enumerate(zip(shape, block_size, strict=True)):
        if block != -1 and _known(size, block) and (block <= 0 or size % block):
            raise ValueError(f"a block of {block} does not divide dimension {dim} of shape {tuple(shape)}")
    return [size if block == -1 else block for size, block in zip(shape, block_size, strict=True)]


def _known(*sizes: int) -> bool:
    """Whether all sizes are plain numbers. Comparing a symbol of a dynamic shape would add a guard that fixes it."""
    return not any(isinstance(size, torch.SymInt) for size in sizes)


def _blocked(x: Tensor, block_size: Sequence[int]) -> tuple[Tensor, list[int]]:
    """``x`` viewed with every split dimension as (blocks, block), and the dimensions to reduce over."""
    shape: list[int] = []
    reduce: list[int] = []
    for size, asked, block in zip(x.shape, block_size, full_block(x.shape, block_size), strict=True):
        if asked == 1:
            shape.append(size)
        elif asked == -1 or (_known(size, block) and size == block):
            reduce.append(len(shape))
            shape.append(size)
        else:
            reduce.append(len(shape) + 1)
            shape += [size // block, block]
    return x.reshape(shape), reduce


def _scale_shape(x: Tensor, block_size: Sequence[int]) -> list[int]:
    return [1 if asked == -1 else size // asked for size, asked in zip(x.shape, block_size, strict=True)]


def _expand(scale: Tensor, x: Tensor, block_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Float32 scales and ``x``, reshaped so that they broadcast."""
    blocked, reduce = _blocked(x, block_size)
    expected = _scale_shape(x, block_size)
    differ = [size != want for size, want in zip(scale.shape, expected, strict=False) if _known(size, want)]
    if scale.ndim != len(expected) or any(differ):
        raise ValueError(
            f"scale of shape {tuple(scale.shape)} does not fit: expected {tuple(expected)} for block_size {list(block_size)}"
        )
    shape = [1 if dim in reduce else size for dim, size in enumerate(blocked.shape)]
    return scale.float().reshape(shape), blocked


def expand_scale(scale: Tensor, x: Tensor, block_size: Sequence[int]) -> Tensor:
    """Float32 scale of every element of ``x``."""
    expanded, blocked = _expand(scale, x, block_size)
    return expanded.expand_as(blocked).reshape(x.shape)


def choose_scale(x: Tensor, block_size: Sequence[int], fmt: str, scale_dtype: torch.dtype) -> Tensor:
    """Absmax scale of every block, ``absmax / lattice_max`` in ``scale_dtype``.

    It is never zero or infinite (see :func:`to_scale_dtype`), even if a block is all zero or holds an infinity. A NaN
    in ``x`` makes the scale of its block NaN, so that it stays visible.
    """
    blocked, reduce = _blocked(x, block_size)
    absmax = blocked.abs().amax(reduce) if reduce else blocked.abs()
    scale = divided(absmax.float(), float(parse(fmt).lattice_max))
    return to_scale_dtype(scale, scale_dtype).reshape(_scale_shape(x, block_size))


def squared_error(x: Tensor, block_size: Sequence[int], scale: Tensor, fmt: str) -> Tensor:
    """Squared error of rounding to nearest, summed over each block: float32, shaped like ``scale``."""
    error = (fake_quantize(x, block_size, scale, fmt, torch.float32) - x.float()).square()
    blocked, reduce = _blocked(error, block_size)
    return (blocked.sum(reduce) if reduce else blocked).reshape(_scale_shape(x, block_size))


def to_scale_dtype(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 ``scale`` cast to ``dtype``, clamped to its largest number and to its smallest one that is normal in
    float32.

    Subnormals of float16 are thus used, since scales of ordinary weights fall there (0.004 / 64 in E3M0), but no scale
    becomes zero on machines that flush float32 subnormals.
    """
    limits = torch.finfo(dtype)
    smallest = max(limits.tiny * limits.eps, torch.finfo(torch.float32).tiny)
    return scale.clamp(smallest, limits.max).to(dtype)


def quantize(x: Tensor, block_size: Sequence[int], scale: Tensor, fmt: str) -> Tensor:
    """Codes of the levels nearest to ``x / scale``: uint8, shaped like ``x``, ties to the even code, saturating.

    The quotient is rounded to float32 before it is compared with the levels. If rounding puts it exactly in the middle
    of two levels, the farther one may be chosen: 3 times in ten million normally distributed weights, and then farther
    by at most 2^-23 of ``|x|``.
    """
    scale, blocked = _expand(scale, x, block_size)
    return parse(fmt).encode(blocked.float() / scale).reshape(x.shape)


def dequantize(codes: Tensor, block_size: Sequence[int], scale: Tensor, fmt: str, output_dtype: torch.dtype) -> Tensor:
    """Values of codes, ``level(codes) * scale`` in ``output_dtype``, shaped like ``codes``; rounded once, from
    float32."""
    scale, blocked = _expand(scale, codes, block_size)
    return (parse(fmt).decode(blocked) * scale).to(output_dtype).reshape(codes.shape)


def fake_quantize(x: Tensor, block_size: Sequence[int], scale: Tensor, fmt: str, output_dtype: torch.dtype) -> Tensor:
    """Equal to ``dequantize(quantize(x))`` in every bit, without computing codes; lowered graphs run it."""
    scale, blocked = _expand(scale, x, block_size)
    return (parse(fmt).round(blocked.float() / scale) * scale).to(output_dtype).reshape(x.shape)


for _implementation in (choose_scale, quantize, dequantize, fake_quantize):
    LIBRARY.impl(_implementation.__name__, _implementation, "CompositeImplicitAutograd")
