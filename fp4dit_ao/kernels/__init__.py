"""How low-bit linears and attention are computed: one module per arithmetic, and the rule that picks one.

Importing this registers every operator of ``torch.ops.fp4dit_ao`` that computes on quantized operands.
"""

from fp4dit_ao.kernels import attention, block_scaled_linear, codebook_linear, gelu
from fp4dit_ao.kernels.cuda import int8_linear
from fp4dit_ao.kernels.dispatch import BACKENDS, linear, pick

__all__ = [
    "BACKENDS", "attention", "block_scaled_linear", "codebook_linear", "gelu", "int8_linear", "linear", "pick",
]  # fmt: skip
