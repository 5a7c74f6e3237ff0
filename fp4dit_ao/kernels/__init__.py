"""How a low-bit linear is computed: one module per arithmetic, and the rule that picks one.

The rule (:data:`BACKENDS`, first match wins) follows from the lattices: operands are small integers, so a product runs
*exactly* on the cheapest unit in which both lattices embed. Every backend has the signature of :func:`linear`.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from fp4dit_ao.formats import NumberFormat, parse
from fp4dit_ao.kernels import (  # noqa: F401, some only register operators
    attention,
    codebook_linear,
    gelu,
    gpu,
    int8,
    quantized_codebook_linear,
    reference,
)

Linear = Callable[[Tensor, Tensor, Tensor, Sequence[int], NumberFormat, NumberFormat | None, Tensor | None], Tensor]

BACKENDS: dict[str, tuple[Callable[[NumberFormat, NumberFormat | None], bool], Linear]] = {
    "int8": (int8.supports, int8.linear),
    "float32": (reference.supports, reference.linear),
}
"""By name: (whether it computes a pair of formats exactly, the implementation)."""


def pick(fmt: NumberFormat, act_fmt: NumberFormat | None) -> str:
    """Name of the backend for a (weight, activation) pair of formats."""
    return next(name for name, (supports, _) in BACKENDS.items() if supports(fmt, act_fmt))


def linear(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    block_size: Sequence[int],
    fmt: str,
    act_fmt: str | None,
    bias: Tensor | None,
) -> Tensor:
    """``x @ W^T + bias`` with ``W`` given by packed codes and scales, and ``x`` quantized token-wise to ``act_fmt``.

    Args:
        x: float ``(..., in_features)``.
        qdata: uint8 ``(out_features, in_features)`` codes; of at most 4 bits, two to a byte, the first in the low nibble.
        scale: ``(out_features or 1, groups)``.
        block_size: of the weight; -1 for a whole dimension.
        fmt: weight format.
        act_fmt: activation format; None multiplies ``x`` as it is.
        bias: ``(out_features,)`` or None.

    Returns:
        ``(..., out_features)`` in the type of ``x``.
    """
    weight_format = parse(fmt)
    act_format = parse(act_fmt) if act_fmt else None
    _, implementation = BACKENDS[pick(weight_format, act_format)]
    return implementation(x, qdata, scale, block_size, weight_format, act_format, bias)
