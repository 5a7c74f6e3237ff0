"""Learned rounding of one unit: gradient descent on the unit's error."""

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from fp4dit_ao.config import ReconstructionConfig
from fp4dit_ao.observers import WeightObserver
from fp4dit_ao.observers.weight import Settled
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

    def solve(self, before: float, bar: tqdm) -> dict[WeightObserver, Settled]:
        """The learned rounding of every observer.

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
        return {observer: self._settled(observer, rule) for observer, rule in rules.items()}

    def _settled(self, observer: WeightObserver, rule: LearnedRounding) -> Settled:
        factor, scale = rule.scale_factor(), observer.scale
        if factor is not None and scale is not None:
            stored = self.error.grids[observer].rescaled(factor.detach()).stored
            assert stored is not None
            scale = stored.reshape(scale.shape)
        return Settled(rule.hard_codes(), scale)

    def _optimise(self, rules: dict[WeightObserver, LearnedRounding], before: float, bar: tqdm) -> None:
        config, graph = self.config, self.error.graph
        optimizer = self.rule.optimizer(list(rules.values()), config)
        rates = [group["lr"] for group in optimizer.param_groups]
        sizes = {observer: weight.numel() for observer, weight in self.error.weights.items()}
        count = sum(sizes.values())
        least, best = float("inf"), list[dict[str, Tensor]]()
        warm = round(config.warmup * config.iters)
        run = torch.compile(graph) if config.compile else graph
        for iteration in range(config.iters):
            optimizer.zero_grad(set_to_none=True)
            *others, last = self._minibatch()
            found = 0.0
            for number, rows in others:
                share = self._share(number, rows, run) / before
                torch.autograd.backward(share)
                found += float(share.detach()) if self.rule.keeps_best else 0.0
            loss = self._share(*last, run) / before
            if self.rule.keeps_best and (found := found + float(loss.detach())) < least:
                least, best = found, [copy.deepcopy(rule.state_dict()) for rule in rules.values()]
            if iteration >= warm and config.regularizer:
                beta = config.beta_at((iteration - warm) / max(1, config.iters - warm))
                for observer, rule in rules.items():
                    loss = loss + rule.regularizer(beta) * (config.regularizer * sizes[observer] / count)
            torch.autograd.backward(loss)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * self.rule.pace(iteration / config.iters)
            optimizer.step()
            bar.update()
        for rule, state in zip(rules.values(), best, strict=False):
            rule.load_state_dict(state)

    def _minibatch(self) -> Iterator[tuple[int, Tensor]]:
        """Rows without replacement, from all streams alike: (stream, rows in it)."""
        chosen = torch.randperm(self.error.rows, generator=self.generator)[: self.config.batch_size].sort().values
        first = 0
        for number, stream in enumerate(self.error.streams):
            inside = chosen[(chosen >= first) & (chosen < first + stream.rows)]
            if len(inside):
                yield number, inside - first
            first += stream.rows

    def _share(self, number: int, rows: Tensor, run: Callable[..., Sequence[Tensor]]) -> Tensor:
        """What some rows contribute to the mean over a minibatch."""
        return self.error.of(number, rows, run) * (len(rows) / min(self.config.batch_size, self.error.rows))
