"""Learned rounding of one unit: gradient descent on the unit's error."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fp4dit_ao.config import ReconstructionConfig
from fp4dit_ao.observers import WeightObserver
from fp4dit_ao.passes.reconstruction.rounding import LearnedRounding
from fp4dit_ao.passes.reconstruction.unit_error import UnitError, rounding_by


class Learner:
    """The optimisation of one unit's roundings.

    Args:
        error: of the unit.
        rule: class of the roundings.
        config: how to learn.
        index: position of the unit; with the seed it determines the minibatches.
    """

    def __init__(self, error: UnitError, rule: type[LearnedRounding], config: ReconstructionConfig, index: int):
        self.error, self.rule, self.config = error, rule, config
        self.generator = torch.Generator().manual_seed(config.seed * 1_000_003 + index)

    def solve(self, before: float, bar: Any) -> dict[WeightObserver, Tensor]:
        """The learned codes of every observer.

        Args:
            before: the unit's error with the rounding that its observers hold; more than 0.
            bar: updated at each step.
        """
        rules = {
            observer: self.rule(weight, self.error.grids[observer]) for observer, weight in self.error.weights.items()
        }
        for observer, rule in rules.items():
            if observer.codes is not None:
                rule.start_from(observer.codes)
        with rounding_by(rules), torch.enable_grad():
            self._optimise(rules, before, bar)
        return {observer: rule.hard_codes() for observer, rule in rules.items()}

    def _optimise(self, rules: dict[WeightObserver, LearnedRounding], before: float, bar: Any) -> None:
        config, graph = self.config, self.error.segment.graph
        optimizer = torch.optim.Adam(
            [
                {"params": list(rule.parameters()), "lr": config.lr or rule.learning_rate(config.step_in_logits)}
                for rule in rules.values()
            ],
            eps=1e-20,  # one weight's share of millions in the gradient is far below the usual 1e-8
            fused=True,
        )
        sizes = {observer: weight.numel() for observer, weight in self.error.weights.items()}
        count = sum(sizes.values())
        warm = round(config.warmup * config.iters)
        run = torch.compile(graph) if config.compile else graph
        for iteration in range(config.iters):
            optimizer.zero_grad(set_to_none=True)
            *others, last = self._minibatch()
            for number, rows in others:
                torch.autograd.backward(self._share(number, rows, run) / before)
            loss = self._share(*last, run) / before
            if iteration >= warm and config.regularizer:
                beta = config.beta_at((iteration - warm) / max(1, config.iters - warm))
                for observer, rule in rules.items():
                    loss = loss + rule.regularizer(beta) * (config.regularizer * sizes[observer] / count)
            torch.autograd.backward(loss)
            optimizer.step()
            bar.update()

    def _minibatch(self) -> Iterator[tuple[int, Tensor]]:
        """Rows without replacement, from all streams alike: (stream, rows in it)."""
        chosen = torch.randperm(self.error.rows, generator=self.generator)[: self.config.batch_size].sort().values
        first = 0
        for number, stream in enumerate(self.error.streams):
            inside = chosen[(chosen >= first) & (chosen < first + stream.rows)]
            if len(inside):
                yield number, inside - first
            first += stream.rows

    def _share(self, number: int, rows: Tensor, run: Any) -> Tensor:
        """What some rows contribute to the mean over a minibatch."""
        return self.error.of(number, rows, run) * (len(rows) / min(self.config.batch_size, self.error.rows))
