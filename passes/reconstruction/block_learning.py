"""The reconstruction of one block: the rounding of its weights that best restores its output."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fp4dit_ao.observers import WeightObserver
from fp4dit_ao.observers.weight import weight_of
from fp4dit_ao.passes.partition import Segment
from fp4dit_ao.passes.reconstruction.report import BlockReport
from fp4dit_ao.passes.reconstruction.rounding.adaround import RULES, AdaRound
from fp4dit_ao.passes.reconstruction.streams import Stream

if TYPE_CHECKING:
    from fp4dit_ao.passes.reconstruction.engine import AdaRoundConfig


class Fixed(nn.Module):
    """A rounding that is settled: stands in for a weight observer's own, which would round anew in every call."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, weight: Tensor) -> Any:
        return self.weight


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
    """Round every weight of a segment once, for all the calls inside: to the learned codes, or to nearest."""
    with torch.no_grad():
        return rounding_by({o: Fixed(o.dequantized(weight_of(segment.graph, node))) for node, o in segment.observers})


class Block:
    """A segment with weights to round, and the data to do it on.

    Args:
        segment: with observers set to fake quantization.
        streams: their ``quantized`` values are before the segment, its inputs; their ``full`` ones behind it, its targets.
        config: how to learn.
        index: of the block; with the seed it determines the minibatches.
    """

    def __init__(self, segment: Segment, streams: list[Stream], config: "AdaRoundConfig", index: int):
        self.segment, self.streams, self.config = segment, streams, config
        self.generator = torch.Generator().manual_seed(config.seed * 1_000_003 + index)
        self.weights = {observer: weight_of(segment.graph, node) for node, observer in segment.observers}
        self.rows = sum(stream.rows for stream in streams)
        self.targets: list[int] = []
        self.power: list[float] = []

    def learn(self, bar: Any) -> BlockReport:
        """Optimise, harden, and keep what is better on all rows: the learned rounding or the nearest."""
        began = time.monotonic()
        nearest = {observer: _levels(observer, weight) for observer, weight in self.weights.items()}
        rules = {observer: RULES[self.config.rule](weight, observer) for observer, weight in self.weights.items()}
        self.targets = self._differentiable(rules)
        self.power = [self._power(self.segment.outputs[i]) for i in self.targets]
        before = self._error()
        after, changed, kept = before, 0.0, "nearest"
        if self.config.iters and self.targets and before > 0:
            with rounding_by(rules), torch.enable_grad():
                self._optimise(list(rules.values()), before, bar)
            for observer, rule in rules.items():
                observer.codes = rule.hard_codes()
            learned = self._error()
            if learned < before:
                moved = sum(int((_levels(o, w) != nearest[o]).sum()) for o, w in self.weights.items())
                after, kept = learned, "learned"
                changed = moved / sum(weight.numel() for weight in self.weights.values())
            else:
                for observer in rules:
                    observer.codes = None
        else:
            bar.update(self.config.iters)
        seconds = time.monotonic() - began
        return BlockReport(self.segment.name, len(rules), before, after, changed, kept, seconds)

    def _differentiable(self, rules: Mapping[WeightObserver, AdaRound]) -> list[int]:
        """Positions of the outputs that depend on this block's weights, and that something reads."""
        stream = self.streams[0]
        with rounding_by(rules), torch.enable_grad():
            outputs = self.segment.graph(*stream.select(stream.quantized, self.segment.inputs, slice(0, 1)))
        return [
            i
            for i, (name, y) in enumerate(zip(self.segment.outputs, outputs, strict=True))
            if isinstance(y, Tensor) and y.requires_grad and name in stream.full and stream.grows(name)
        ]

    def _optimise(self, rules: list[AdaRound], before: float, bar: Any) -> None:
        config = self.config
        optimizer = torch.optim.Adam(
            [{"params": [rule.alpha], "lr": config.lr or rule.learning_rate(config.step_in_logits)} for rule in rules],
            eps=1e-20,  # one weight's share of millions in the gradient is far below the usual 1e-8
            fused=True,
        )
        count = sum(rule.alpha.numel() for rule in rules)
        warm = round(config.warmup * config.iters)
        run = torch.compile(self.segment.graph) if config.compile else self.segment.graph
        for iteration in range(config.iters):
            optimizer.zero_grad(set_to_none=True)
            *others, last = self._minibatch()
            for number, rows in others:
                torch.autograd.backward(self._share(number, rows, run) / before)
            loss = self._share(*last, run) / before
            if iteration >= warm and config.regularizer:
                beta = config.beta_at((iteration - warm) / max(1, config.iters - warm))
                for rule in rules:
                    loss = loss + rule.regularizer(beta) * (config.regularizer * rule.alpha.numel() / count)
            torch.autograd.backward(loss)
            optimizer.step()
            bar.update()

    def _minibatch(self) -> Iterator[tuple[int, Tensor]]:
        """Rows without replacement, from all streams alike: (stream, rows in it)."""
        chosen = torch.randperm(self.rows, generator=self.generator)[: self.config.batch_size].sort().values
        first = 0
        for number, stream in enumerate(self.streams):
            inside = chosen[(chosen >= first) & (chosen < first + stream.rows)]
            if len(inside):
                yield number, inside - first
            first += stream.rows

    def _share(self, number: int, rows: Tensor, run: Callable[..., Any]) -> Tensor:
        """What some rows contribute to the mean over a minibatch."""
        return self._loss(number, rows, run) * (len(rows) / min(self.config.batch_size, self.rows))

    def _loss(self, number: int, rows: Tensor | slice, run: Callable[..., Any]) -> Tensor:
        """Squared error of some rows of one stream, relative to the full-precision output's power over all rows."""
        stream = self.streams[number]
        outputs = run(*stream.select(stream.quantized, self.segment.inputs, rows))
        wanted = stream.select(stream.full, [self.segment.outputs[i] for i in self.targets], rows)
        parts = [
            nn.functional.mse_loss(outputs[i].float(), y.float()) / power
            for i, y, power in zip(self.targets, wanted, self.power, strict=True)
        ]
        return torch.stack(parts).mean()

    @torch.no_grad()
    def _error(self) -> float:
        """:meth:`_loss` over all rows."""
        total = 0.0
        with settled(self.segment):
            for number, stream in enumerate(self.streams):
                for rows in stream.chunks(self.config.batch_size):
                    total += float(self._loss(number, rows, self.segment.graph)) * (rows.stop - rows.start)
        return total / self.rows

    def _power(self, name: str) -> float:
        """Mean square of a full-precision value, over all rows."""
        total = 0.0
        for stream in self.streams:
            for rows in stream.chunks(self.config.batch_size):
                (value,) = stream.select(stream.full, [name], rows)
                total += float(value.float().square().mean()) * (rows.stop - rows.start)
        return max(total / self.rows, torch.finfo(torch.float32).tiny)


def _levels(observer: WeightObserver, weight: Tensor) -> Tensor:
    """What the weight is rounded to, in steps: codes would tell minus zero from zero."""
    return observer.fmt.decode(observer.quantized(weight)[0])
