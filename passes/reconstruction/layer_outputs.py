"""Outputs of the linears inside a unit: quantized, and the original's."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fp4dit_ao.observers import set_fake_quantize
from fp4dit_ao.passes.partition import Segment, quantized_linears, with_outputs
from fp4dit_ao.passes.reconstruction.streams import Stream


class LayerOutputs:
    """A unit's graph that puts out what its quantized linears do, behind its own outputs.

    The original's outputs of linears are computed again for each minibatch, from full-precision inputs of the unit: kept, they
    would take many times the memory of the unit's own.

    Args:
        segment: of the unit; streams keep the full-precision values of its inputs.

    Attributes:
        graph: shares everything with the segment's.
    """

    def __init__(self, segment: Segment):
        self._segment = segment
        self.graph = with_outputs(segment, quantized_linears(segment.graph))

    @torch.no_grad()
    def originals(self, stream: Stream, rows: Tensor | slice) -> list[Tensor]:
        """What the linears put out in full precision, on full-precision inputs."""
        set_fake_quantize(self.graph, False, False, paused=True)
        try:
            outputs = self.graph(*stream.select(stream.full, self._segment.inputs, rows))
        finally:
            set_fake_quantize(self.graph, True, True)
        return self.of(outputs)

    def of(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The linears' among all outputs of :attr:`graph`."""
        found: list[Tensor] = list(outputs[len(self._segment.outputs) :])
        return found
