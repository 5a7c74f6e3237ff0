"""Scales of the hardware's block formats: a power of two for 32 elements (MX), or E4M3 times one float32 per tensor
(NVFP4).

An element of the OCP formats is ``level * unit * scale``, with :func:`unit` fixed by the format; here it is
``level * step``. Steps are computed in float32, which holds their values: powers of two, or an E4M3 number times the
tensor's scale.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fp4dit_ao.formats import FloatFormat
from fp4dit_ao.ops.division import divided
from fp4dit_ao.ops.library import LIBRARY
from fp4dit_ao.ops.quantization import choose_scale

BLOCKS = {"e8m0": 32, "e4m3": 16}
"""Elements per block, by the type of the scale."""
ELEMENTS = {"e8m0": ("e2m1", "e2m3", "e3m2"), "e4m3": ("e2m1",)}
"""Element formats that the standard (OCP MX, NVFP4) defines, by the type of the scale."""
E4M3_MIN, E4M3_MAX = 2.0**-6, 448.0
"""Smallest normal and largest number of E4M3, the range of hardware scales."""


def unit(fmt: FloatFormat) -> float:
    """Value of level 1 in the OCP format, its smallest subnormal: 0.5 for E2M1, 1/8 for E2M3, 1/16 for E3M2."""
    return 2.0 ** (2 - 2 ** (fmt.exponent_bits - 1) - fmt.mantissa_bits)


def power_of_two_above(scale: Tensor) -> Tensor:
    """Least power of two not below ``scale`` (positive float32), so that no element saturates; at most 2^127.

    NaN stays NaN.
    """
    bits = scale.view(torch.int32)
    exponent = ((bits >> 23) + ((bits & 0x7FFFFF) > 0).to(torch.int32)).clamp(max=254)
    return torch.where(scale == scale, (exponent << 23).view(torch.float32), scale)


def two_level_scale(
    x: Tensor, block_size: Sequence[int], fmt: str, top: float = E4M3_MAX, stretch: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Scales of NVFP4: the largest magnitude of the tensor gets the largest block scale and the largest level.

    Args:
        x: float tensor.
        block_size: as in torchao; the blocks that share an E4M3 scale.
        fmt: format of the elements.
        top: block scale of the largest magnitude: E4M3's largest, or less to leave room.
        stretch: factor on the scales of the blocks.

    Returns:
        Scales of the blocks (float32, each an E4M3 number) and the float32 scale of the tensor. A step is their
        product.
    """
    lattice = FloatFormat.parse(fmt)
    largest = divided(x.abs().amax().float(), top * lattice.lattice_max * unit(lattice))
    tensor = largest.clamp(min=torch.finfo(torch.float32).tiny)
    blocks = choose_scale(x, block_size, fmt, torch.float32) / unit(lattice) / tensor
    if stretch != 1:
        blocks = blocks * stretch
    return blocks.clamp(E4M3_MIN, E4M3_MAX).to(torch.float8_e4m3fn).float(), tensor * unit(lattice)


def choose_block_scale(x: Tensor, block_size: Sequence[int], fmt: str, kind: str) -> Tensor:
    """Step of every block: float32, shape ``x.shape[i] // block_size[i]``; ``kind`` is a key of :data:`BLOCKS`."""
    if kind == "e8m0":
        return power_of_two_above(choose_scale(x, block_size, fmt, torch.float32))
    scale, tensor = two_level_scale(x, block_size, fmt)
    return scale * tensor


LIBRARY.define("choose_block_scale(Tensor x, SymInt[] block_size, str fmt, str kind) -> Tensor")
LIBRARY.impl("choose_block_scale", choose_block_scale, "CompositeImplicitAutograd")
