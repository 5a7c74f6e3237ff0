"""Two rotations fitted to the outliers of an input, and an order of its channels in between (DuQuant, arXiv 2406.01721).

    X R1 P R2,   R1 and R2 block-diagonal with one matrix for all blocks, P a permutation

Each rotation is a product of simple ones, ``E R E``: ``E`` swaps the channel that holds the largest magnitude with the first of
its block, and the first row of ``H``, of equal entries, spreads it over all of them, which ``Q`` mixes by chance
(``R = H diag(1, Q) / sqrt(n)``, H a Hadamard matrix, Q a random orthogonal one). As many are taken, of at most ``steps``, as
leave the smallest peak. In between, channels are sorted by size and dealt out to the blocks to and fro, so that the blocks
have like shares of large ones.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fp4dit_ao.passes.transforms.hadamard import rotate, sylvester


@dataclass(frozen=True)
class DualRotation:
    """What is done to an input, in this order.

    Attributes:
        first: float32 ``(block, block)``, orthogonal, of every block.
        order: int64 ``(channels,)``, the channel at each place afterwards.
        second: like ``first``, of the blocks of reordered channels.
    """

    first: Tensor
    order: Tensor
    second: Tensor


def dual_rotation(rows: Tensor, block: int, steps: int, seed: int = 0) -> DualRotation:
    """The rotations and the order for an input of which ``rows`` ``(rows, channels)`` are known.

    Args:
        rows: of any float type.
        block: channels of a block, a power of two that divides them.
        steps: most steps of each rotation.
        seed: of the random matrices.
    """
    rows = rows.float()
    first = greedy_rotation(rows, block, steps, seed)
    rotated = rotate(rows, first)
    order = dealt_order(rotated.abs().amax(0), block)
    return DualRotation(first, order, greedy_rotation(rotated[:, order], block, steps, seed + 1))


def greedy_rotation(rows: Tensor, block: int, steps: int, seed: int = 0) -> Tensor:
    """The product of at most ``steps`` simple rotations that leaves the smallest largest magnitude; float32 ``(block, block)``.

    Args:
        rows: float32 ``(rows, channels)``.
        block: channels of a block, a power of two that divides them.
        steps: at least 1.
        seed: of the random matrix.
    """
    x = rows.reshape(-1, block)
    simple = spreading_rotation(block, seed).to(x)
    product = torch.eye(block, device=x.device)
    sizes = x.abs().amax(0)
    best = float(sizes.max()), product
    for _ in range(steps):
        swap = torch.arange(block, device=x.device)
        outlier = int(sizes.argmax())
        swap[0], swap[outlier] = outlier, 0
        step = simple[swap][:, swap]
        x, product = x @ step, product @ step
        sizes = x.abs().amax(0)
        peak = float(sizes.max())
        if peak < best[0]:
            best = peak, product
    return best[1]


def spreading_rotation(block: int, seed: int = 0) -> Tensor:
    """The matrix R: orthogonal, float32 ``(block, block)``, its first column even."""
    inner = torch.linalg.qr(torch.randn(block - 1, block - 1, generator=torch.Generator().manual_seed(seed))).Q
    return sylvester(block) * block**-0.5 @ torch.block_diag(torch.ones(1, 1), inner)


def dealt_order(size: Tensor, block: int) -> Tensor:
    """Channels sorted by ``size`` ``(channels,)`` and dealt out to the blocks to and fro: int64 ``(channels,)``."""
    blocks = len(size) // block
    rounds = size.argsort(descending=True, stable=True).reshape(block, blocks).clone()
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.T.flatten()
