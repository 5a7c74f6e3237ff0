"""Calibration rows in shards, shared out over processes: any number of them reconstructs what one does, bit for bit.

Shard s of S has the samples s, s + S, s + 2 S, …. Every step draws rows from each shard alike, so that all processes have as
much to do. What a step needs of all rows is a sum over shards: of gradients and Hessians by pairs of shards, of errors in the
order of shards. So results depend on the number of shards, and on that of the processes not at all.

With other numbers of shards, other rows are drawn together and sums are taken in another order: those results differ as two
seeds do.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.fx import GraphModule

from fp4dit_ao.passes.reconstruction.streams import Rows, Stream, checked, stacked
from fp4dit_ao.util.world import PairwiseSum, World


@dataclass(frozen=True)
class Shard:
    """One shard that this process holds.

    Attributes:
        number: among all shards.
        streams: positions of its streams in :attr:`Shards.streams`.
    """

    number: int
    streams: range


class Shards:
    """The rows that this process holds, and how many others do.

    Args:
        rows: number of rows of every shard.
        streams: of every shard that this process holds.
        batch_size: rows per step, of all shards together.
        world: the processes; consecutive ranks hold equally many consecutive shards.

    Attributes:
        streams: of this process.
        own: its shards.
        count: number of shards, of all processes.
        total_rows: number of rows of all shards.
        chunk: rows of one forward pass.
    """

    def __init__(self, rows: Sequence[int], streams: Sequence[Sequence[Stream]], batch_size: int, world: World):
        self.rows, self.world, self.total_rows = list(rows), world, sum(rows)
        self.streams = [stream for shard in streams for stream in shard]
        self.own, position = list[Shard](), 0
        for number, part in enumerate(streams, world.rank * len(streams)):
            self.own.append(Shard(number, range(position, position + len(part))))
            position += len(part)
        self.count = len(self.rows)
        self.chunk = max(self._counts(batch_size))

    def draw(self, size: int, generator: Generator) -> list[Tensor]:
        """Positions of ``size`` rows within every shard, drawn without replacement, from each alike."""
        return [
            torch.randperm(rows, generator=generator)[:count].sort().values
            for rows, count in zip(self.rows, self._counts(size), strict=True)
        ]

    def _counts(self, size: int) -> list[int]:
        return [size * (s + 1) // self.count - size * s // self.count for s in range(self.count)]

    def share(self, shard: Shard) -> float:
        """The fraction of all rows that a shard has: the weight of its mean in that over all rows."""
        return self.rows[shard.number] / self.total_rows

    def mean(self, over: Callable[[Shard], float]) -> float:
        """A mean over all rows, given the sum over the rows of a shard; shards are added up in their order."""
        total = 0.0
        for part in self.world.gathered([over(shard) for shard in self.own]):
            for number in part:
                total += number
        return total / self.total_rows

    def sum_tensors(self, of: Callable[[Shard], Sequence[Tensor]]) -> list[Tensor]:
        """The sums over all shards of tensors for each, by pairs; the tensors may be overwritten."""
        total = PairwiseSum()
        for shard in self.own:
            total.add(of(shard))
        return [self.world.summed(x) for x in total.total()]


def one_shard(streams: Sequence[Stream], batch_size: int) -> Shards:
    """All rows in one shard of one process."""
    return Shards([sum(stream.rows for stream in streams)], [streams], batch_size, World())


def divide(
    model: GraphModule, samples: Sequence[Mapping[str, object]], count: int, batch_size: int, world: World
) -> Shards:
    """Divides samples into ``count`` shards, and builds the streams of those that this process holds.

    Raises:
        ValueError: see :func:`~fp4dit_ao.passes.reconstruction.streams.checked`; fewer samples or rows per step than shards; or
            shards that processes cannot share.
    """
    each = count // world.size
    if count % world.size or (world.size > 1 and each & (each - 1)):
        raise ValueError(
            f"{count} shards for {world.size} processes; each must hold the same number of them, a power of two: start "
            f"{count} processes, or give shards={world.size}"
        )
    flat = checked(model, samples)
    for what, found in (("samples", len(flat)), ("rows per step (batch_size)", batch_size)):
        if found < count:
            raise ValueError(f"{found} {what} for {count} shards; give at least one per shard, or fewer shards")
    rows = Rows(model, flat)
    parts = [flat[number::count] for number in range(count)]
    mine = parts[world.rank * each : (world.rank + 1) * each]
    return Shards(
        [sum(rows.count(values) for values in part) for part in parts],
        [stacked(part, rows) for part in mine],
        batch_size,
        world,
    )
