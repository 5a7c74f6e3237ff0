"""The plug-in point *allocation*: which format each layer takes, given what each would cost and err."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from fp4dit_ao.util.registry import Registry


@dataclass(frozen=True)
class Choice:
    """One format that a layer may take.

    Attributes:
        fmt: name of the format.
        bits: stored bits per weight, scales included.
        error: error of the layer's output if its weight has this format, relative to the output's power; or what else the
            allocation measures.
    """

    fmt: str
    bits: float
    error: float


@dataclass(frozen=True)
class LayerChoices:
    """A layer and the formats that it may take.

    Attributes:
        name: fully qualified name of the layer.
        weights: number of its weights.
        choices: at least one.
    """

    name: str
    weights: int
    choices: tuple[Choice, ...]


class Allocation(Protocol):
    """Chooses a format for every layer.

    It is called once, with the layers in the order of the graph, and must not change them. Errors of layers add up: an
    allocation minimises their sum over all layers.
    """

    def __call__(self, layers: Sequence[LayerChoices], budget_bits: float | None) -> dict[str, str]:
        """Names of formats by names of layers.

        Args:
            layers: in the order of the graph, each with at least one choice.
            budget_bits: largest mean of stored bits per weight over all weights of ``layers``; None for no limit.

        Raises:
            ValueError: the budget is below what the smallest choices take; the message says how much that is.
        """
        ...


@runtime_checkable
class MeasuredAllocation(Allocation, Protocol):
    """One that goes by errors of the model's output: each layer's are measured with that layer quantized alone.

    Attributes:
        samples: number of calibration samples to compare outputs on.
    """

    samples: int

    def group(self, name: str) -> str:
        """How a layer's error is measured, a key of ``sensitivity.METRICS``, by its fully qualified name."""
        ...

    def candidates(self, layers: Sequence[LayerChoices], budget_bits: float | None) -> list[dict[str, str]]:
        """Allocations as :meth:`__call__` gives one; that is taken with which the model's output errs least.

        Raises:
            ValueError: the budget is below what the smallest choices take.
        """
        ...


def measures(allocation: str) -> bool:
    """Whether the allocation of that name measures errors of the model's output, which takes time.

    Raises:
        ValueError: there is none of that name.
    """
    return isinstance(ALLOCATIONS.find(allocation), MeasuredAllocation)


ALLOCATIONS: Registry[Allocation] = Registry("allocation")
"""Allocations by name."""


def check_budget(layers: Sequence[LayerChoices], budget_bits: float | None) -> None:
    """Raises ``ValueError`` if not even the smallest choice of every layer fits into the budget."""
    total = sum(layer.weights for layer in layers)
    least = sum(layer.weights * min(choice.bits for choice in layer.choices) for layer in layers) / max(1, total)
    if budget_bits is not None and least > budget_bits * (1 + 1e-9):
        raise ValueError(
            f"a budget of {budget_bits:g} bits per weight cannot be met: the smallest formats of these layers take "
            f"{least:.3f}; raise budget_bits, or offer smaller formats"
        )
