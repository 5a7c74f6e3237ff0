"""``torch.ops.fp4dit_ao.codebook_dequantize``: a weight with codebook groups as floats, on plain operators."""

import torch
from torch import Tensor

from fp4dit_ao.formats.codebook_groups import levels_of
from fp4dit_ao.ops.library import LIBRARY

LIBRARY.define(
    "codebook_dequantize(Tensor codes, Tensor index, Tensor codebooks, Tensor row_scale, ScalarType output_dtype, "
    "str fmt='') -> Tensor"
)


def codebook_dequantize(
    codes: Tensor, index: Tensor, codebooks: Tensor, row_scale: Tensor, output_dtype: torch.dtype, fmt: str = ""
) -> Tensor:
    """``codebooks[index][codes] * row_scale`` in ``output_dtype``; the product is rounded once, from float32.

    Args:
        codes: uint8 ``(out_features, in_features)``, 0 to 15.
        index: uint8 ``(out_features, groups)``, each group's codebook; groups divide the input features.
        codebooks: int8 ``(16, 16)``: what each code stands for.
        row_scale: float32 ``(out_features,)``.
        output_dtype: float type of the result.
        fmt: name of the set of codebooks, for passes that rewrite the graph; it does not change the result.

    Returns:
        ``(out_features, in_features)``.

    Raises:
        ValueError: shapes that do not fit.
    """
    fits = codes.ndim == index.ndim == 2 and codes.shape[0] == index.shape[0] == row_scale.numel()
    if not fits or codes.shape[1] % index.shape[1]:
        raise ValueError(
            f"codebook_dequantize: codes {tuple(codes.shape)} with index {tuple(index.shape)} and row_scale "
            f"{tuple(row_scale.shape)}; expected (rows, columns), (rows, groups) with groups dividing columns, and (rows,)"
        )
    return (levels_of(codes, index, codebooks) * row_scale.float().reshape(-1, 1)).to(output_dtype)


LIBRARY.impl("codebook_dequantize", codebook_dequantize, "CompositeImplicitAutograd")
