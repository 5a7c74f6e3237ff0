"""Moments of Adam in 8 bits: blocks of 256 values on a dynamic map (8-bit optimizers, arXiv 2110.02861, section 2).

A block's largest magnitude is 1. A code's leading zeros say the decade, from 1 down to 1e-6, and the rest of its bits divide
the decade evenly (arXiv 1511.04561): fine where values are large, and never zero where they are small, which is what a
divisor such as Adam's second moment needs.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256
"""Values that share a largest magnitude."""
SMALLEST = 4096
"""Tensors of fewer values stay in float32, as in bitsandbytes."""
DECADES = 7
"""Decades that a map covers."""


class Moment(NamedTuple):
    """A stored moment.

    Attributes:
        codes: uint8, or float32 values where the tensor is small; shaped like the moment.
        absmax: float32, one for each block; empty where the tensor is small.
    """

    codes: Tensor
    absmax: Tensor


@cache
def dynamic_map(signed: bool) -> Tensor:
    """The 256 values of a map, ascending: float32 within [-1, 1] (signed) or [0, 1], with 0 and 1."""
    values = [0.0, 1.0]
    for decade in range(DECADES):
        count = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1, count + 1, dtype=torch.float64)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - DECADES + 1)).tolist()
        values += middles + [-x for x in middles if signed]
    return torch.tensor(sorted(values), dtype=torch.float32)


def store(moment: Tensor, signed: bool) -> Moment:
    """The nearest values of the map, block by block."""
    if moment.numel() < SMALLEST:
        return Moment(moment.float().clone(), moment.new_zeros(0))
    blocks = torch.nn.functional.pad(moment.flatten().float(), (0, -moment.numel() % BLOCK)).reshape(-1, BLOCK)
    absmax = blocks.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    found = dynamic_map(signed).to(moment.device)
    codes = torch.bucketize(blocks / absmax, (found[:-1] + found[1:]) / 2).to(torch.uint8)
    return Moment(codes.flatten()[: moment.numel()].reshape(moment.shape), absmax.flatten())


def restore(stored: Moment, signed: bool) -> Tensor:
    """The moment, float32."""
    codes, absmax = stored
    if codes.dtype != torch.uint8:
        return codes
    values = dynamic_map(signed).to(codes.device)[codes.flatten().long()]
    return (values * absmax.repeat_interleave(BLOCK)[: codes.numel()]).reshape(codes.shape)
