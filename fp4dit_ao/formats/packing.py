"""Packed storage of codes: two per byte for formats of at most four bits."""

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs uint8 codes ``(..., K)`` of at most four bits into ``(..., K/2)``: two per byte, the first in the low
    nibble.

    Wider codes stay one per byte.

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
    """Inverse of :func:`pack`: uint8 codes ``(..., K)``."""
    if bits > 4:
        return packed
    return torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)
