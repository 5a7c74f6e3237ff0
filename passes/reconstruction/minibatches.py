"""Minibatches of one unit: drawn by the seed ahead of all steps, gathered on the device."""

import contextlib

import torch
from torch import Tensor

from fp4dit_ao.passes.reconstruction.unit_error import Batch, UnitError


class Minibatches:
    """The rows of every step: without replacement, from all streams alike.

    A step first calls :meth:`load`, then reads :meth:`batches`, which can be captured in a CUDA graph if :attr:`fixed`: each
    call then reads the same memory.

    Args:
        error: of the unit, with its data.
        size: rows a step.
        count: steps.
        generator: on the CPU.

    Attributes:
        size: rows a step, at most as many as there are.
        fixed: whether every step has the same sizes: all rows are in one stream.
    """

    def __init__(self, error: UnitError, size: int, count: int, generator: torch.Generator):
        self._error = error
        drawn = [torch.randperm(error.rows, generator=generator)[:size].sort().values for _ in range(count)]
        self._drawn = torch.stack(drawn)
        self.size = self._drawn.shape[1]
        self.fixed = len(error.streams) == 1
        self._resident = self.fixed and not error.streams[0].offloaded
        device = error.streams[0].device
        if self._resident:
            self._drawn = self._drawn.to(device)
        self._rows = self._drawn[0].clone()
        self._current: list[Batch] = []
        self._side = torch.cuda.Stream(device) if device.type == "cuda" and not self._resident else None

    def load(self, step: int) -> None:
        """Make the rows of this step the current ones. What is in host memory is copied while the step before is running."""
        if self._resident:
            self._rows.copy_(self._drawn[step], non_blocking=True)
            return
        with self._aside():
            found = [self._error.gather(number, rows) for number, rows in self._split(self._drawn[step])]
        if self._side is not None:
            torch.cuda.current_stream().wait_stream(self._side)
            for x in (x for batch in found for x in batch.tensors() if x.is_cuda):
                x.record_stream(torch.cuda.current_stream())
        if self.fixed and self._current:
            for mine, new in zip(self._current[0].tensors(), found[0].tensors(), strict=True):
                mine.copy_(new, non_blocking=True)
        else:
            self._current = found

    def _aside(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self._side is None else torch.cuda.stream(self._side)

    def batches(self) -> list[Batch]:
        """The current rows, by stream."""
        return [self._error.gather(0, self._rows)] if self._resident else self._current

    def _split(self, chosen: Tensor) -> list[tuple[int, Tensor]]:
        """(stream, rows in it)."""
        found, first = [], 0
        for number, stream in enumerate(self._error.streams):
            inside = chosen[(chosen >= first) & (chosen < first + stream.rows)]
            if len(inside):
                found.append((number, inside - first))
            first += stream.rows
        return found
