"""The contract of an objective: how far a unit's quantized output is from the full-precision one."""

from abc import ABC, abstractmethod

from torch import Tensor

from fp4dit_ao.util.registry import Registry


class Objective(ABC):
    """A difference of one output tensor, which learned rounding minimises and by which every rounding is judged.

    A unit's output may be several tensors; their errors are averaged. For each, ``reconstruct`` first calls :meth:`power`
    on the full-precision values, a chunk of calibration rows at a time, and averages the results over all rows. Then it
    calls :meth:`error` on minibatches while a rounding is learned (under autograd), and on all rows, a chunk at a time, to
    compare roundings. Averages over chunks and minibatches are weighted by their rows, so both should be means over rows.
    """

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
            quantized: float, what the unit puts out with rounded weights, on quantized inputs; carries gradients while a
                rounding is learned.
            full: float, the same shape: what the original puts out on the original's inputs.
            power: the average of :meth:`power` over all rows; positive.

        Returns:
            a scalar, not negative, differentiable with respect to ``quantized``, and free of units: near 1 where the output
            is worth nothing.
        """


OBJECTIVES: Registry[Objective] = Registry("objective")
"""Objectives by name."""
