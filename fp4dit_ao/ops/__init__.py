"""Operators ``torch.ops.fp4dit_ao``: choose a scale, quantize to codes, dequantize. Importing this registers them."""

from fp4dit_ao.ops.division import divided
from fp4dit_ao.ops.library import LIBRARY
from fp4dit_ao.ops.quantization import (
    choose_scale,
    dequantize,
    expand_scale,
    fake_quantize,
    full_block,
    quantize,
    to_scale_dtype,
)

__all__ = [
    "LIBRARY", "choose_scale", "dequantize", "divided", "expand_scale", "fake_quantize", "full_block", "quantize",
    "to_scale_dtype",
]  # fmt: skip
