"""Dropped quantization: while a rounding is learned, elements of inputs are quantized at random (QDrop, arXiv 2203.05740).

A rounding that is right for one pattern of the inputs' rounding errors need not be right for another. PD-Quant's code, which
is built on QDrop's, mixes the unit's input half and half from the quantized and the full-precision stream, and lets half of
the elements of every quantized activation inside the unit pass as they are.
"""

import contextlib
import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fp4dit_ao.observers.activation import ActivationObserver


class Dropping:
    """Random choice of the elements that are not quantized; the same numbers draw the same elements.

    Args:
        chance: probability that an element is in full precision.
        seed: of the draws: what tells units and runs apart.
    """

    def __init__(self, chance: float, seed: str):
        self.chance, self._seed = chance, seed

    @contextlib.contextmanager
    def drawn(self, graph: nn.Module, device: torch.device, *numbers: int) -> Iterator[None]:
        """Let the activation observers of ``graph`` drop; what is drawn inside depends on ``numbers`` alone."""
        observers = [module for module in graph.modules() if isinstance(module, ActivationObserver)]
        devices = (
            [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []
        )
        with torch.random.fork_rng(devices):
            torch.manual_seed(random.Random(f"{self._seed} {numbers}").getrandbits(63))
            try:
                for observer in observers:
                    observer.drop = self.chance
                yield
            finally:
                for observer in observers:
                    observer.drop = 0.0

    def mixed(self, quantized: Sequence[object], full: Sequence[object]) -> list[object]:
        """A unit's inputs, element by element the full-precision value with the probability, else the quantized one."""
        return [self._mixed(q, f) for q, f in zip(quantized, full, strict=True)]

    def _mixed(self, quantized: object, full: object) -> object:
        if not (isinstance(quantized, Tensor) and isinstance(full, Tensor) and quantized.is_floating_point()):
            return quantized
        return torch.where(torch.rand(full.shape, device=full.device) < self.chance, full, quantized)
