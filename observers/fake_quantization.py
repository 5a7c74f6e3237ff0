"""Switches a prepared graph between observing and fake quantization."""

import contextlib
from collections.abc import Iterator

from torch import nn

from fp4dit_ao.observers.base import FloatObserver
from fp4dit_ao.observers.weight import WeightObserver


def set_fake_quantize(model: nn.Module, weight: bool, activation: bool, paused: bool = False) -> None:
    """Switch the observers of a prepared graph between observing (False) and fake quantization (True).

    ``paused`` makes them do neither: the graph then computes the original model, and notes nothing.
    """
    for module in model.modules():
        if isinstance(module, FloatObserver):
            module.fake_quantize = weight if isinstance(module, WeightObserver) else activation
            module.paused = paused


@contextlib.contextmanager
def frozen_parameters(model: nn.Module) -> Iterator[None]:
    """Turns gradients of the model's own parameters off while rounding or scales are learned, and on again afterwards.

    Observers are back to observing at the end, after an error, too.
    """
    wanted = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in wanted:
            p.requires_grad_(False)
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)
        set_fake_quantize(model, weight=False, activation=False)
