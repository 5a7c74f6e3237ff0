"""The contract of an objective: how far a unit's quantized output is from the full-precision one."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fp4dit_ao.util.registry import Registry


class Errors(NamedTuple):
    """Errors of what an objective asks for, one scalar a tensor, for some rows.

    Attributes:
        outputs: the unit's outputs that depend on its weights; at least one.
        layers: outputs of the unit's quantized linears, relative to the power of the unit's outputs; none unless
            ``needs_layers``.
        predictions: the model's outputs, the unit's error passed on by the full-precision rest of the network; none unless
            ``needs_tail``.
    """

    outputs: Sequence[Tensor]
    layers: Sequence[Tensor] = ()
    predictions: Sequence[Tensor] = ()


class Objective(ABC):
    """A difference of outputs, which learned rounding minimises and by which every rounding is judged.

    For each tensor that it asks for, ``reconstruct`` first calls :meth:`power` on the full-precision values, a chunk of
    calibration rows at a time, and averages the results over all rows. Then it calls :meth:`error` on minibatches while a
    rounding is learned (under autograd), and on all rows, a chunk at a time, to compare roundings; and :meth:`combined` on
    what that gives. Averages over chunks and minibatches are weighted by their rows, so all three should be means over rows.
    """

    needs_layers: ClassVar[bool] = False
    """Whether it weighs the outputs of the unit's linears: one more forward of the unit a step, and memory for its
    full-precision inputs."""
    needs_tail: ClassVar[bool] = False
    """Whether it weighs the model's outputs: a forward and a backward pass through the rest of the network a step."""
    drop: float = 0.0
    """Probability that an element of the unit's input, and of an activation that is quantized inside, is in full precision
    while a rounding is learned; it is judged with all quantized. Where there is a tail, one more forward of the unit a step."""

    @abstractmethod
    def power(self, full: Tensor) -> Tensor:
        """What errors are relative to.

        Args:
            full: float, full-precision values of one output for some rows; any shape.

        Returns:
            a scalar, not negative.
        """

    @abstractmethod
    def error(self, quantized: Tensor, full: Tensor, power: float) -> Tensor:
        """The error of one output for some rows.

        Args:
            quantized: float, what is put out with rounded weights, on quantized inputs; carries gradients while a rounding is
                learned.
            full: float, the same shape: what the original puts out on the original's inputs.
            power: the average of :meth:`power` over all rows; positive.

        Returns:
            a scalar, not negative, differentiable with respect to ``quantized``, and free of units: near 1 where the output
            is worth nothing.
        """

    def combined(self, errors: Errors) -> Tensor:
        """The unit's error, a scalar, from those of the tensors: by default the mean over the unit's outputs."""
        return torch.stack(list(errors.outputs)).mean()


OBJECTIVES: Registry[Objective] = Registry("objective")
"""Objectives by name."""
