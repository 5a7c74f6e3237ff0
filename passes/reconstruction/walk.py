"""The walk of the streams through a plan: full-precision values behind each unit in turn, quantized ones before it."""

from collections.abc import Callable, Iterator, Sequence

import torch

from fp4dit_ao.observers import set_fake_quantize
from fp4dit_ao.passes.partition import Segment
from fp4dit_ao.passes.reconstruction.scopes import Plan, Unit
from fp4dit_ao.passes.reconstruction.streams import Stream
from fp4dit_ao.passes.reconstruction.unit_error import settled


def walk(plan: Plan, streams: Sequence[Stream], chunk: int, keep_inputs: bool = False) -> Iterator[Unit]:
    """Every unit, when quantized values stand before it and full-precision ones behind it; then to the end of the graph.

    Full-precision values run ahead by as many steps as a unit covers. Observers of a unit are set to fake quantization.

    Args:
        plan: of a scope.
        streams: at the start of the graph.
        chunk: rows at a time.
        keep_inputs: whether full-precision values of a unit's inputs are kept until it is done.
    """
    full = quantized = 0  # steps that each has taken
    inputs = [set(unit.segment.inputs) for unit in plan.units] if keep_inputs else []
    for number, unit in enumerate((*plan.units, None)):
        for stream in streams:
            stream.hold(set().union(*inputs[number:]))
        first, last = (unit.first, unit.last) if unit else (len(plan.steps), -1)
        while quantized < first:
            if full == quantized:
                _advance_full(plan.steps[full], streams, chunk)
                full += 1
            _advance_quantized(plan.steps[quantized], streams, chunk)
            quantized += 1
        while full <= last:
            _advance_full(plan.steps[full], streams, chunk)
            full += 1
        if unit:
            yield unit


def planned_bytes(
    plan: Plan,
    streams: Sequence[Stream],
    device: torch.device,
    keep_inputs: bool = False,
    visit: Callable[[Unit, Stream], None] = lambda unit, row: None,
) -> int:
    """Bytes that the streams will take, found by sending one row of each through the whole graph; ``visit`` is called with
    every unit, and the row before it."""
    total = 0
    for stream in streams:
        alone = [stream.first_row()]
        alone[0].move_to(device)
        for unit in walk(plan, alone, 1, keep_inputs):
            visit(unit, alone[0])
        total += alone[0].peak
    return total


def _advance_full(segment: Segment, streams: Sequence[Stream], chunk: int) -> None:
    """Leaves the segment's observers set to fake quantization."""
    set_fake_quantize(segment.graph, False, False, paused=True)
    for stream in streams:
        stream.advance_full(segment, chunk)
    set_fake_quantize(segment.graph, True, True)


def _advance_quantized(segment: Segment, streams: Sequence[Stream], chunk: int) -> None:
    with settled(segment):
        for stream in streams:
            stream.advance_quantized(segment, chunk)
