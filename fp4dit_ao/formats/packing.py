"""Storage of codes: two to a byte where they have at most four bits."""

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Store uint8 codes ``(..., K)`` compactly: two 4-bit codes a byte ``(..., K/2)``, the first in the low nibble.

    Codes wider than four bits keep a byte each.

    Raises:
        ValueError: K is odd for codes of at most four bits.
    """
    if bits > 4:
        return codes
    if codes.shape[-1] % 2:
        raise ValueError(
            f"cannot pack {codes.shape[-1]} codes of {bits} bits a row two to a byte; the count must be even"
        )
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).contiguous()


def unpack(packed: Tensor, bits: int) -> Tensor:
    """What :func:`pack` was given: uint8 ``(..., K)``."""
    if bits > 4:
        return packed
    return torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)
