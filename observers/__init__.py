"""Observers: they watch a tensor in the prepared graph, and say how that edge is quantized.

Import them from ``fp4dit_ao.observers``.
"""

from fp4dit_ao.observers.activation import StaticActivationObserver, TokenActivationObserver
from fp4dit_ao.observers.base import FloatObserver
from fp4dit_ao.observers.block_scaled import BlockActivationObserver, BlockWeightObserver
from fp4dit_ao.observers.codebook import CodebookGrid, CodebookWeightObserver
from fp4dit_ao.observers.fake_quantization import set_fake_quantize
from fp4dit_ao.observers.grid import Bracket, Grid
from fp4dit_ao.observers.weight import WeightObserver

__all__ = [
    "BlockActivationObserver",
    "BlockWeightObserver",
    "Bracket",
    "CodebookGrid",
    "CodebookWeightObserver",
    "FloatObserver",
    "Grid",
    "StaticActivationObserver",
    "TokenActivationObserver",
    "WeightObserver",
    "set_fake_quantize",
]
