"""The error of one unit's outputs: what its roundings are learned on and judged by."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fp4dit_ao.observers import Grid, WeightObserver
from fp4dit_ao.observers.activation import StaticActivationObserver
from fp4dit_ao.observers.weight import weight_of
from fp4dit_ao.passes.partition import Segment
from fp4dit_ao.passes.reconstruction.dropping import Dropping
from fp4dit_ao.passes.reconstruction.layer_outputs import LayerOutputs
from fp4dit_ao.passes.reconstruction.network_tail import NetworkTail
from fp4dit_ao.passes.reconstruction.objectives import Errors, Objective
from fp4dit_ao.passes.reconstruction.shards import Shard, Shards
from fp4dit_ao.passes.reconstruction.streams import Values


class Fixed(nn.Module):
    """A weight that is rounded already, in the place of a weight observer's own rounding, which would round anew in every call;
    what requires a gradient gets it."""

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
def rounding_by(
    rules: Mapping[WeightObserver, nn.Module] | Mapping[StaticActivationObserver, nn.Module],
) -> Iterator[None]:
    """Let these modules round for the observers: weights, or inputs with a static range."""
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


class Batch(NamedTuple):
    """Some rows of a stream, on the device.

    Attributes:
        number: of the stream.
        rows: positions in it.
        inputs: arguments of the unit.
        wanted: full-precision values of its outputs that count.
    """

    number: int
    rows: Tensor | slice
    inputs: list[object]
    wanted: list[Tensor]

    @property
    def size(self) -> int:
        """How many rows."""
        return self.rows.stop - self.rows.start if isinstance(self.rows, slice) else len(self.rows)

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        return [x for x in (self.rows, *self.inputs, *self.wanted) if isinstance(x, Tensor)]


class UnitError:
    """A segment with weights to round, the data to do it on, and the error of what it puts out.

    Args:
        segment: with observers set to fake quantization.
        shards: the ``quantized`` values of their streams are before the segment, its inputs; the ``full`` ones behind it, its
            targets.
        objective: what counts as its error.
        tail: the rest of the network; None unless the objective needs it.
        recompute: whether a step of learning keeps of each block inside its inputs alone.

    Attributes:
        weights: the original weight of every observer.
        grids: the values that each can be rounded to.
        streams: of the shards, in this process.
        targets: positions of the outputs that depend on the unit's weights, and that something reads.
        graph: what a step of learning runs: the segment's, or one that also puts out what its linears do.
    """

    def __init__(
        self,
        segment: Segment,
        shards: Shards,
        objective: Objective,
        tail: NetworkTail | None = None,
        recompute: bool = False,
    ):
        self.recompute = recompute
        self.segment, self.shards, self.objective, self.streams = segment, shards, objective, shards.streams
        self.weights = {observer: weight_of(segment.graph, node) for node, observer in segment.observers}
        self.grids: dict[WeightObserver, Grid] = {o: o.grid(weight) for o, weight in self.weights.items()}
        self.targets = self._differentiable()
        self._layers = LayerOutputs(segment) if objective.needs_layers else None
        self._tail = tail
        self.graph = self._layers.graph if self._layers else segment.graph
        full = [stream.full for stream in self.streams]
        self._power = [self._power_of(segment.outputs[i], full) for i in self.targets]
        self._predictions: list[Values] = (
            [tail.originals(stream, shards.chunk) for stream in self.streams] if tail else []
        )
        self._results = self._predicted()
        self._predicted_power = {name: self._power_of(name, self._predictions) for name in self._results}

    def _differentiable(self) -> list[int]:
        stream = self.streams[0]
        with rounding_by({observer: Differentiable() for observer in self.weights}), torch.enable_grad():
            outputs = self.segment.graph(*stream.select(stream.quantized, self.segment.inputs, slice(0, 1)))
        return [
            i
            for i, (name, y) in enumerate(zip(self.segment.outputs, outputs, strict=True))
            if isinstance(y, Tensor) and y.requires_grad and name in stream.full and stream.grows(name)
        ]

    def _predicted(self) -> list[str]:
        """The model's outputs that have an error."""
        stream = self.streams[0]
        values = self._predictions[0] if self._predictions else {}
        return [name for name, y in values.items() if _is_float(y) and stream.grows(name)]

    def gather(self, number: int, rows: Tensor | slice) -> Batch:
        """Some rows of stream ``number``."""
        stream, segment = self.streams[number], self.segment
        inputs = stream.select(stream.quantized, segment.inputs, rows)
        return Batch(number, rows, inputs, stream.select(stream.full, [segment.outputs[i] for i in self.targets], rows))

    def of(self, batch: Batch, run: Callable[..., Sequence[Tensor]], dropping: Dropping | None = None) -> Tensor:
        """The objective for some rows.

        Args:
            run: :attr:`graph`, or what stands for it.
            dropping: what mixes full-precision elements into the unit's inputs; None where all are quantized.
        """
        number, rows, inputs, wanted = batch
        # before the pass that is learned on: both are of the same modules
        layers = self._layers.originals(self.streams[number], rows) if self._layers else []
        if dropping is None:
            outputs = passed_on = run(*inputs)
        else:
            stream = self.streams[number]
            outputs = run(*dropping.mixed(inputs, stream.select(stream.full, self.segment.inputs, rows)))
            passed_on = run(*inputs) if self._tail else outputs  # PD-Quant predicts from inputs that are not mixed
        errors = Errors(
            [
                self.objective.error(outputs[i], y, power)
                for i, y, power in zip(self.targets, wanted, self._power, strict=True)
            ],
            self._errors_of_layers(outputs, layers),
            self._errors_of_predictions(number, rows, dict(zip(self.segment.outputs, passed_on, strict=False))),
        )
        return self.objective.combined(errors)

    def _errors_of_layers(self, outputs: Sequence[Tensor], wanted: list[Tensor]) -> list[Tensor]:
        if self._layers is None:
            return []
        power = sum(self._power) / len(self._power)
        return [self.objective.error(y, x, power) for y, x in zip(self._layers.of(outputs), wanted, strict=True)]

    def _errors_of_predictions(self, number: int, rows: Tensor | slice, outputs: dict[str, Tensor]) -> list[Tensor]:
        if self._tail is None:
            return []
        stream = self.streams[number]
        found = dict(zip(self._tail.results, self._tail.outputs(stream, rows, outputs), strict=True))
        wanted = stream.select(self._predictions[number], self._results, rows)
        return [
            self.objective.error(found[name], y, self._predicted_power[name])
            for name, y in zip(self._results, wanted, strict=True)
        ]

    @torch.no_grad()
    def total(self) -> float:
        """:meth:`of` all rows, with the rounding that the observers hold; 0 if nothing depends on the weights."""
        if not self.targets:
            return 0.0
        with settled(self.segment):
            return self.shards.mean(self._summed)

    def _summed(self, shard: Shard) -> float:
        """:meth:`of`, times the number of rows, over all rows of a shard."""
        total = torch.zeros((), dtype=torch.float64, device=self.streams[0].device)
        for number in shard.streams:
            for rows in self.streams[number].chunks(self.shards.chunk):
                total += self.of(batch := self.gather(number, rows), self.graph) * batch.size
        return float(total)

    def _power_of(self, name: str, values: list[Values]) -> float:
        """The objective's power of a full-precision value, over all rows, given the values of each stream."""

        def summed(shard: Shard) -> float:
            total = 0.0
            for number in shard.streams:
                stream = self.streams[number]
                for rows in stream.chunks(self.shards.chunk):
                    (value,) = stream.select(values[number], [name], rows)
                    total += float(self.objective.power(value)) * (rows.stop - rows.start)
            return total

        return max(self.shards.mean(summed), torch.finfo(torch.float32).tiny)


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
