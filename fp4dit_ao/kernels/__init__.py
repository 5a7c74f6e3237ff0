"""How low-bit linears and attention are computed: units, and the tables that pick one for formats and device.

Importing this registers every operator of ``torch.ops.fp4dit_ao`` that computes on quantized operands.
"""

from fp4dit_ao.kernels import (
    attention,
    block_scaled_linear,
    codebook_linear,
    gelu,
    level_linear,
    quantized_codebook_linear,
)
from fp4dit_ao.kernels.dispatch import LINEAR, TABLES, LinearOperands, linear, pick
from fp4dit_ao.kernels.units import Unit, UnitTable

__all__ = [
    "LINEAR", "TABLES", "LinearOperands", "Unit", "UnitTable", "attention", "block_scaled_linear", "codebook_linear", "gelu",
    "level_linear", "linear", "pick", "quantized_codebook_linear",
]  # fmt: skip
