"""``torch.ops.fp4dit_ao.log2_round``: attention's probabilities as powers of two of the largest (DGQ, arXiv 2501.04304).

    code = clip(round(-log2(p / largest)), 0, 2^bits - 1),    p^ = largest 2^-code

for probabilities p of one prompt, ``largest`` their largest over heads, queries and keys, found online. There is no zero. Sums
of a row are not 1 any more. The column of a text's start token, which takes most of the attention in the models of the paper,
stays as it is, and is none of those that the largest is taken of.
"""

import torch
from torch import Tensor

from fp4dit_ao.ops.library import LIBRARY

MOST_BITS = 6
"""Further bits would add powers below ``2^-63``."""

LIBRARY.define("log2_round(Tensor p, int bits, bool keep_first) -> Tensor")


def log2_round(p: Tensor, bits: int, keep_first: bool) -> Tensor:
    """Rounded probabilities, shaped like ``p`` and of its type.

    Args:
        p: float ``(batch, heads, queries, keys)``, not negative; each row of the batch is a prompt's.
        bits: of a code, 1 to 6.
        keep_first: whether the first key's column stays as it is.
    """
    first, rest = (p[..., :1], p[..., 1:]) if keep_first else (p[..., :0], p)
    largest = (
        rest.float().flatten(1).amax(1).clamp_min(torch.finfo(torch.float32).tiny).reshape(-1, *[1] * (p.ndim - 1))
    )
    code = torch.round(-torch.log2(rest.float() / largest)).clamp(0, 2**bits - 1).to(torch.int32)
    rounded = (largest * ((127 - code) << 23).view(torch.float32)).to(
        p.dtype
    )  # 2^-code from its bits: exact everywhere
    return torch.cat([first, rounded], -1) if keep_first else rounded


LIBRARY.impl("log2_round", log2_round, "CompositeImplicitAutograd")
