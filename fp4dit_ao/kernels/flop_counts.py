"""FLOPs of our operators, as ``torch.utils.flop_counter.FlopCounterMode`` counts them: those of the float model.

A file that defines an operator registers one of these formulas for it. Arguments are shapes in place of tensors.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch.utils.flop_counter import register_flop_formula


def register(operator: str, formula: Callable[..., int]) -> None:
    """Makes ``formula`` that of ``torch.ops.fp4dit_ao``'s ``operator``."""
    register_flop_formula(getattr(torch.ops.fp4dit_ao, operator))(formula)


def linear(tokens: Sequence[int], *_: object, out_shape: Sequence[int] | None = None, **options: object) -> int:
    """Two for each input of each output.

    Args:
        tokens: shape, the inputs last.
        out_shape: shape of the result.
    """
    assert out_shape is not None
    return 2 * math.prod(out_shape) * tokens[-1]


def int8_attention(q: Sequence[int], q_scale: Sequence[int], k: Sequence[int], *_: object, **options: object) -> int:
    """Two for each feature of each score, and as many for each value that a score weighs.

    Args:
        q, q_scale, k: shapes; of q and k ``(digits, batch, heads, tokens, dim)``.
    """
    batch, heads, tokens, dim = q[1:]
    return 4 * batch * heads * tokens * k[3] * dim


def fp8_attention(
    q: Sequence[int], q_scale: Sequence[int], k: Sequence[int], k_scale: Sequence[int], v: Sequence[int],
    *_: object, **options: object,
) -> int:  # fmt: skip
    """As :func:`int8_attention`, with ``(batch, tokens, heads, dim)``; of q and k the dim may be padded."""
    batch, tokens, heads = q[:3]
    return 4 * batch * heads * tokens * k[1] * v[3]
