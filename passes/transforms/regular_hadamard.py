"""Regular Hadamard rotations (ConvRot): blocks of channels mixed so that neither a channel nor a whole row stands out."""

from typing import ClassVar

import torch
from torch import Tensor
from torchao.quantization.pt2e.quantizer import Quantizer

from fp4dit_ao.passes.transforms.hadamard import SMALLEST, Hadamard

_SEED = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))
"""A Hadamard matrix of order 4 all of whose rows and columns sum to 2."""


class RegularHadamard(Hadamard):
    """:class:`Hadamard` with matrices whose rows and columns all have the same sum, ``sqrt(n)`` times that of one entry.

    Source: ConvRot (arXiv 2512.03673). In diffusion transformers whole rows stand out, too: tokens whose channels are large and
    of one sign. The first column of Sylvester's matrix, all of one sign, sums such a row up into one channel of ``sqrt(n)``
    times its size, the worst there can be (the squared column sums of a Hadamard matrix add up to ``n^2``, its theorem 3.1); a
    *regular* one, with equal sums, leaves it as it is, the best there can be (theorem 3.2). They exist for powers of 4, as the
    Kronecker powers of one of order 4. Signs by chance, as in QuaRot, would undo the equal sums of columns, so there are none;
    the matrix is symmetric, and its own inverse.

    The paper rotates every linear, in groups of 256. Here a block is the largest power of 4 that divides the width, at most
    ``block`` (64 of a width of 1152), and, as with ``hadamard``, the places are rotated where the output errs less;
    ``everywhere=True`` does as the paper.

    Args:
        quantizer: says which linears are quantized, and with which observers.
        block: channels of a block, at most; a power of 4.
        rows: of each input, kept to measure output errors on.
        everywhere: rotate every linear, whatever its error.

    Raises:
        ValueError: a block that is no power of 4 from 16 on, or fewer than one row.
    """

    name: ClassVar[str] = "regular_hadamard"

    def __init__(self, quantizer: Quantizer | None = None, block: int = 256, rows: int = 512, everywhere: bool = False):
        if block < SMALLEST or regular_block(block) != block:
            raise ValueError(f"RegularHadamard: block={block}; it must be a power of 4 from {SMALLEST} on")
        super().__init__(quantizer, block, rows, everywhere=everywhere)

    def largest_block(self, width: int) -> int:
        return min(regular_block(width), self.block)

    def matrix(self, block: int) -> Tensor:
        return regular_rotation(block)


def regular_block(width: int) -> int:
    """The largest power of 4 that divides ``width``."""
    power = width & -width
    return power if power.bit_length() % 2 else power // 2


def regular_rotation(block: int) -> Tensor:
    """The regular Hadamard matrix of order ``block``, a power of 4, over ``sqrt(block)``: orthogonal; float32."""
    seed, matrix = torch.tensor(_SEED, dtype=torch.float32), torch.ones(1, 1)
    while len(matrix) < block:
        matrix = torch.kron(matrix, seed)
    return matrix * float(block) ** -0.5
