"""Switches a prepared graph between observing and fake quantization."""

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
