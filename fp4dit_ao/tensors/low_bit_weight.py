"""``LowBitWeight``: any of this package's tensors for a linear's weight."""

from fp4dit_ao.tensors.block_scaled import MXWeight, NVFP4Weight
from fp4dit_ao.tensors.quantized_weight import QuantizedWeight

LowBitWeight = QuantizedWeight | MXWeight | NVFP4Weight
"""Weights that say which ``unit`` computes their linear."""
