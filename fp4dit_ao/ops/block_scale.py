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
from fp4dit_ao.ops.quantization import choose_scale, squared_error

BLOCKS = {"e8m0": 32, "e4m3": 16}
"""Elements per block, by the type of the scale."""
ELEMENTS = {"e8m0": ("e2m1", "e2m3", "e3m2"), "e4m3": ("e2m1",)}
"""Element formats that the standard (OCP MX, NVFP4) defines, by the type of the scale."""
FOUR_OVER_SIX = "e4m3_four_over_six"
"""The kind of :func:`choose_block_scale` that gives each block the better of two E4M3 scales."""
RATIO, TOP = 6 / 4, 256.0
"""The larger of the two over the smaller, and the smaller one of the largest magnitude: ``1.5 * 256 = 384`` still fits E4M3."""
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
    """Step of every block: float32, shape ``x.shape[i] // block_size[i]``.

    Args:
        kind: a key of :data:`BLOCKS`, or :data:`FOUR_OVER_SIX`.
    """
    if kind == "e8m0":
        return power_of_two_above(choose_scale(x, block_size, fmt, torch.float32))
    scale, tensor = (
        four_over_six_scale(x, block_size, fmt) if kind == FOUR_OVER_SIX else two_level_scale(x, block_size, fmt)
    )
    return scale * tensor


def four_over_six_scale(x: Tensor, block_size: Sequence[int], fmt: str) -> tuple[Tensor, Tensor]:
    """Scales of NVFP4 with the largest magnitude of each block on 6 or on 4, E2M1's two largest values, whichever errs less by
    the squared error; of equals, on 6 (Four over six, arXiv 2512.02010). As :func:`two_level_scale` gives them."""
    six, tensor = two_level_scale(x, block_size, fmt, TOP)
    four, _ = two_level_scale(x, block_size, fmt, TOP, stretch=RATIO)
    errors = [squared_error(x, block_size, blocks * tensor, fmt) for blocks in (six, four)]
    return torch.where(errors[1] < errors[0], four, six), tensor


LIBRARY.define("choose_block_scale(Tensor x, SymInt[] block_size, str fmt, str kind) -> Tensor")
LIBRARY.impl("choose_block_scale", choose_block_scale, "CompositeImplicitAutograd")
