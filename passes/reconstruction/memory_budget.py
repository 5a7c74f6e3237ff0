"""How reconstruction keeps to an amount of memory: the unit at work is in memory, all else in files if it has to be.

Float weights of a model that was loaded in the type of its safetensors files are mapped from them, and are in memory only while
they are read. What reconstruction adds beside the unit at work are the streams, and codes and scales of finished weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fp4dit_ao.observers.weight import weight_of
from fp4dit_ao.passes.partition import Segment
from fp4dit_ao.passes.reconstruction.rounding import ClosedFormRounding, RoundingRule
from fp4dit_ao.passes.reconstruction.scopes import Plan, Unit
from fp4dit_ao.passes.reconstruction.streams import Stream
from fp4dit_ao.passes.reconstruction.unit_error import Differentiable, rounding_by
from fp4dit_ao.util.mapped_files import will_need

LEARNED, SOLVED = 88, 36
"""Bytes that a weight of the unit at work takes at most: its levels, scales, learned variables, gradients and Adam's state; and
where it is solved for."""
HESSIAN = 64
"""Bytes for each entry of the largest Hessian: eight matrices in float64, while it is inverted."""
BACKWARD = 2
"""How many times what autograd keeps a step takes: gradients and intermediates are as large as that."""


@dataclass(frozen=True)
class Need:
    """Memory that a unit takes while it is at work.

    Attributes:
        unit: its name.
        weights: bytes for its weights.
        rows: bytes for the rows of a step.
    """

    unit: str
    weights: int
    rows: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.rows


def need_of(unit: Unit, rule: RoundingRule, row: Stream, rows: int) -> Need:
    """What ``unit`` will take, about.

    Args:
        unit: set to fake quantization.
        rule: of its rounding.
        row: a stream of one row, whose values stand before the unit.
        rows: of a step.
    """
    shapes = [parameter.shape for parameter in _weights(unit.segment)]
    count = sum(shape.numel() for shape in shapes)
    if isinstance(rule, ClosedFormRounding):
        weights = SOLVED * count + HESSIAN * max(shape[-1] ** 2 for shape in shapes)
    else:
        weights = LEARNED * count
    return Need(unit.segment.name, weights, BACKWARD * rows * _kept_by_autograd(unit.segment, row))


def check(memory: int, taken: int, need: Need, rows: int) -> int:
    """Bytes of ``memory`` that are left for the streams.

    Args:
        memory: bytes that the process may take.
        taken: bytes that it has taken before.
        need: of the largest unit.
        rows: of a step.

    Raises:
        ValueError: nothing is left.
    """
    left = memory - taken - need.total
    if left >= 0:
        return left
    raise ValueError(
        f"{_gb(memory)} of memory are too little: this process takes {_gb(taken)} already, and rounding {need.unit}, the "
        f"largest unit, about {_gb(need.weights)} for its weights and {_gb(need.rows)} for a step of {rows} rows; allow "
        f"{_gb(taken + need.total, up=True)}, or choose a smaller batch_size, scope='layer', or rounding='gptq'"
    )


def prefetch_after(plan: Plan, unit: Unit) -> None:
    """Starts reading the weights from a unit to the end of the next one, while the unit is at work."""
    following = [other.last for other in plan.units if other.last > unit.last]
    last = min(following, default=len(plan.steps) - 1)
    for step in plan.steps[unit.last + 1 : last + 1]:
        will_need(step.graph.parameters())


def _weights(segment: Segment) -> Sequence[Tensor]:
    return [weight_of(segment.graph, node) for node, _ in segment.observers]


def _kept_by_autograd(segment: Segment, row: Stream) -> int:
    """Bytes that are kept for the backward pass of one row, beside parameters."""
    parameters = {parameter.data_ptr() for parameter in segment.graph.parameters()}
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        if x.data_ptr() not in parameters:
            kept[x.data_ptr()] = max(x.nbytes, kept.get(x.data_ptr(), 0))
        return x

    weights = {observer: Differentiable() for _, observer in segment.observers}
    inputs = row.select(row.quantized, segment.inputs, slice(0, 1))
    with rounding_by(weights), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        segment.graph(*inputs)
    return sum(kept.values())


def _gb(size: int, up: bool = False) -> str:
    return f"{(size + 5 * 10**6 if up else size) / 10**9:.2f} GB"
