"""Minibatches of one unit: drawn by the seed ahead of all steps, gathered on the device."""

import contextlib

import torch
from torch import Tensor

from fp4dit_ao.passes.reconstruction.shards import Shard
from fp4dit_ao.passes.reconstruction.unit_error import Batch, UnitError


class Minibatches:
    """The rows of every step: without replacement, from all shards and streams alike.

    A step first calls :meth:`load`, then reads :meth:`batches`, which can be captured in a CUDA graph if :attr:`fixed`: each
    call then reads the same memory.

    Args:
        error: of the unit, with its data.
        size: rows a step, of all shards together.
        count: steps.
        generator: on the CPU; processes have the same, and each draws for all.

    Attributes:
        fixed: whether every step has the same sizes: there is one shard, with all rows in one stream.
    """

    def __init__(self, error: UnitError, size: int, count: int, generator: torch.Generator):
        self._error = error
        own = [shard.number for shard in error.shards.own]
        steps = [
            [rows[number] for number in own] for rows in (error.shards.draw(size, generator) for _ in range(count))
        ]
        self._drawn = {number: torch.stack(rows) for number, rows in zip(own, zip(*steps, strict=True), strict=True)}
        self.fixed = error.shards.count == 1 and len(error.streams) == 1
        self._resident = self.fixed and not error.streams[0].offloaded
        device = error.streams[0].device
        if self._resident:
            self._drawn[0] = self._drawn[0].to(device)
        first = error.shards.own[0].number
        self._rows = self._drawn[first][0].clone()
        self._current: dict[int, list[Batch]] = {}
        self._side = torch.cuda.Stream(device) if device.type == "cuda" and not self._resident else None

    def load(self, step: int) -> None:
        """Make the rows of this step the current ones. What is in host memory is copied while the step before is running."""
        if self._resident:
            self._rows.copy_(self._drawn[0][step], non_blocking=True)
            return
        with self._aside():
            found = {
                shard.number: [
                    self._error.gather(*part) for part in self._split(shard, self._drawn[shard.number][step])
                ]
                for shard in self._error.shards.own
            }
        if self._side is not None:
            torch.cuda.current_stream().wait_stream(self._side)
            for x in (x for part in found.values() for batch in part for x in batch.tensors() if x.is_cuda):
                x.record_stream(torch.cuda.current_stream())
        if self.fixed and self._current:
            for mine, new in zip(self._current[0][0].tensors(), found[0][0].tensors(), strict=True):
                mine.copy_(new, non_blocking=True)
        else:
            self._current = found

    def _aside(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self._side is None else torch.cuda.stream(self._side)

    def batches(self, shard: Shard) -> list[tuple[Batch, float]]:
        """The current rows of a shard, by stream, and the weight of their mean in that over all rows."""
        found = [self._error.gather(0, self._rows)] if self._resident else self._current[shard.number]
        drawn, share = self._drawn[shard.number].shape[1], self._error.shards.share(shard)
        return [(batch, batch.size / drawn * share) for batch in found]

    def _split(self, shard: Shard, chosen: Tensor) -> list[tuple[int, Tensor]]:
        """(stream, rows in it)."""
        found, first = [], 0
        for number in shard.streams:
            stream = self._error.streams[number]
            inside = chosen[(chosen >= first) & (chosen < first + stream.rows)]
            if len(inside):
                found.append((number, inside - first))
            first += stream.rows
        return found
