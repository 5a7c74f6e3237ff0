"""The error of one unit's outputs: what its roundings are learned on and judged by."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fp4dit_ao.observers import Grid, WeightObserver
from fp4dit_ao.observers.weight import weight_of
from fp4dit_ao.passes.partition import Segment
from fp4dit_ao.passes.reconstruction.objectives import Objective
from fp4dit_ao.passes.reconstruction.streams import Stream


class Fixed(nn.Module):
    """A settled rounding: stands in for a weight observer's own, which would round anew in every call."""

    weight: Tensor

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        return self.weight


class Differentiable(nn.Module):
    """No rounding; whatever depends on the weight then requires a gradient."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.detach().requires_grad_()


@contextlib.contextmanager
def rounding_by(rules: Mapping[WeightObserver, nn.Module]) -> Iterator[None]:
    """Let these modules round the observers' weights."""
    try:
        for observer, rule in rules.items():
            observer.rounding = rule
        yield
    finally:
        for observer in rules:
            observer.rounding = None


def settled(segment: Segment) -> contextlib.AbstractContextManager[None]:
    """Round every weight of a segment once, for all the calls inside: to the observer's codes, or to nearest."""
    with torch.no_grad():
        return rounding_by({o: Fixed(o.dequantized(weight_of(segment.graph, node))) for node, o in segment.observers})


class UnitError:
    """A segment with weights to round, the data to do it on, and the error of what it puts out.

    Args:
        segment: with observers set to fake quantization.
        streams: their ``quantized`` values are before the segment, its inputs; their ``full`` ones behind it, its targets.
        objective: the error of one output.
        batch_size: rows at a time.

    Attributes:
        weights: the original weight of every observer.
        grids: the values that each can be rounded to.
        rows: calibration rows.
        targets: positions of the outputs that depend on the unit's weights, and that something reads.
    """

    def __init__(self, segment: Segment, streams: list[Stream], objective: Objective, batch_size: int):
        self.segment, self.streams, self.objective, self.batch_size = segment, streams, objective, batch_size
        self.weights = {observer: weight_of(segment.graph, node) for node, observer in segment.observers}
        self.grids: dict[WeightObserver, Grid] = {o: o.grid(weight) for o, weight in self.weights.items()}
        self.rows = sum(stream.rows for stream in streams)
        self.targets = self._differentiable()
        self._power = [self._power_of(segment.outputs[i]) for i in self.targets]

    def _differentiable(self) -> list[int]:
        stream = self.streams[0]
        with rounding_by({observer: Differentiable() for observer in self.weights}), torch.enable_grad():
            outputs = self.segment.graph(*stream.select(stream.quantized, self.segment.inputs, slice(0, 1)))
        return [
            i
            for i, (name, y) in enumerate(zip(self.segment.outputs, outputs, strict=True))
            if isinstance(y, Tensor) and y.requires_grad and name in stream.full and stream.grows(name)
        ]

    def of(self, number: int, rows: Tensor | slice, run: Callable[..., Sequence[Tensor]]) -> Tensor:
        """The objective for some rows of stream ``number``, averaged over the outputs.

        Args:
            run: the segment's graph, or its compiled form.
        """
        stream = self.streams[number]
        outputs = run(*stream.select(stream.quantized, self.segment.inputs, rows))
        wanted = stream.select(stream.full, [self.segment.outputs[i] for i in self.targets], rows)
        parts = [
            self.objective.error(outputs[i], y, power)
            for i, y, power in zip(self.targets, wanted, self._power, strict=True)
        ]
        return torch.stack(parts).mean()

    @torch.no_grad()
    def total(self) -> float:
        """:meth:`of` all rows, with the rounding that the observers hold; 0 if nothing depends on the weights."""
        if not self.targets:
            return 0.0
        total = 0.0
        with settled(self.segment):
            for number, stream in enumerate(self.streams):
                for rows in stream.chunks(self.batch_size):
                    total += float(self.of(number, rows, self.segment.graph)) * (rows.stop - rows.start)
        return total / self.rows

    def _power_of(self, name: str) -> float:
        """The objective's power of a full-precision value, over all rows."""
        total = 0.0
        for stream in self.streams:
            for rows in stream.chunks(self.batch_size):
                (value,) = stream.select(stream.full, [name], rows)
                total += float(self.objective.power(value)) * (rows.stop - rows.start)
        return max(total / self.rows, torch.finfo(torch.float32).tiny)
