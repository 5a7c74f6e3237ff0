"""Learned rounding of one unit: gradient descent on the unit's error."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from fp4dit_ao.config import ReconstructionConfig
from fp4dit_ao.observers import WeightObserver
from fp4dit_ao.observers.weight import Settled
from fp4dit_ao.passes.reconstruction.rounding import LearnedRounding
from fp4dit_ao.passes.reconstruction.shards import Drawn, Shard
from fp4dit_ao.passes.reconstruction.unit_error import UnitError, rounding_by

Run = Callable[..., Sequence[Tensor]]
"""A unit's graph, or its compiled form."""


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
        config, graph, shards = self.config, self.error.graph, self.error.shards
        optimizer = self.rule.optimizer(list(rules.values()), config)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        rates = [group["lr"] for group in optimizer.param_groups]
        least, best = float("inf"), list[dict[str, Tensor]]()
        run = torch.compile(graph) if config.compile else graph
        for iteration in range(config.iters):
            step = _Step(rules, before, self._beta(iteration), shards.draw(self.generator))
            gradients = shards.sum_tensors(partial(self._gradients, step, parameters, run))
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            if self.rule.keeps_best and (found := shards.sum_numbers(step.loss_of)) < least:
                least, best = found, [copy.deepcopy(rule.state_dict()) for rule in rules.values()]
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * self.rule.pace(iteration / config.iters)
            optimizer.step()
            bar.update()
        for rule, state in zip(rules.values(), best, strict=False):
            rule.load_state_dict(state)

    def _beta(self, iteration: int) -> float | None:
        """The regularizer's exponent; None without one."""
        config = self.config
        warm = round(config.warmup * config.iters)
        if iteration < warm or not config.regularizer:
            return None
        return config.beta_at((iteration - warm) / max(1, config.iters - warm))

    def _gradients(self, step: "_Step", parameters: Sequence[Tensor], run: Run, shard: Shard) -> list[Tensor]:
        """What one shard adds to the gradients of a step; the last one, the regularizer's too."""
        for parameter in parameters:
            parameter.grad = None
        *others, last = step.rows[shard.number]
        found = 0.0
        for rows in others:
            share = self._share(*rows, run) / step.before
            torch.autograd.backward(share)
            found += float(share.detach()) if self.rule.keeps_best else 0.0
        loss = self._share(*last, run) / step.before
        if self.rule.keeps_best:
            step.losses[shard.number] = found + float(loss.detach())
        if step.beta is not None and self.error.shards.is_last(shard):
            sizes = {observer: weight.numel() for observer, weight in self.error.weights.items()}
            count = sum(sizes.values())
            for observer, rule in step.rules.items():
                loss = loss + rule.regularizer(step.beta) * (self.config.regularizer * sizes[observer] / count)
        torch.autograd.backward(loss)
        return [torch.zeros_like(x) if x.grad is None else x.grad for x in parameters]

    def _share(self, number: int, rows: Tensor, weight: float, run: Run) -> Tensor:
        """What some rows contribute to the mean over a minibatch."""
        return self.error.of(number, rows, run) * weight


@dataclass(frozen=True)
class _Step:
    """One step of the optimisation.

    Attributes:
        rules: the roundings.
        before: the error that losses are relative to.
        beta: exponent of the regularizer; None without one.
        rows: of this process, by shard.
        losses: of this process, by shard, once they are known.
    """

    rules: dict[WeightObserver, LearnedRounding]
    before: float
    beta: float | None
    rows: dict[int, Drawn]
    losses: dict[int, float] = field(default_factory=dict)

    def loss_of(self, shard: Shard) -> float:
        """What a shard's rows contribute to the mean over the minibatch."""
        return self.losses[shard.number]
