"""Learned rounding of one unit: gradient descent on the unit's error."""

from collections.abc import Callable

import torch
from tqdm import tqdm

from fp4dit_ao.config import ReconstructionConfig
from fp4dit_ao.observers import WeightObserver
from fp4dit_ao.observers.weight import Settled
from fp4dit_ao.passes.reconstruction.cuda_graph import Captured, can_capture
from fp4dit_ao.passes.reconstruction.iteration import Iteration
from fp4dit_ao.passes.reconstruction.minibatches import Minibatches
from fp4dit_ao.passes.reconstruction.plateau import Schedule
from fp4dit_ao.passes.reconstruction.rounding import LearnedRounding
from fp4dit_ao.passes.reconstruction.unit_error import UnitError, rounding_by

SHOWN = 100
"""Steps between two looks at the loss, which wait for the device."""


class Learner:
    """The optimisation of one unit's roundings.

    Args:
        error: of the unit.
        rule: class of the roundings.
        config: how to learn.
        index: position of the unit; with the seed it determines the minibatches, and what the objective drops.
    """

    def __init__(self, error: UnitError, rule: type[LearnedRounding], config: ReconstructionConfig, index: int):
        self.error, self.rule, self.config, self.index = error, rule, config, index
        self.generator = torch.Generator().manual_seed(config.seed * 1_000_003 + index)

    def solve(self, before: float, bar: tqdm) -> dict[WeightObserver, Settled]:
        """The learned rounding of every observer.

        Args:
            before: the unit's error with the rounding that its observers hold; more than 0.
            bar: updated at each step, and by the steps that a plateau saves.
        """
        rules = {
            observer: self.rule(weight, self.error.grids[observer]) for observer, weight in self.error.weights.items()
        }
        for observer, rule in rules.items():
            if observer.codes is not None:
                rule.start_from(observer.codes)
        minibatches = Minibatches(self.error, self.config.batch_size, self.config.iters, self.generator)
        iteration = Iteration(self.error, rules, self.config, minibatches, before, self.index)
        with rounding_by(iteration.soft.leaves), torch.enable_grad():
            self._optimise(iteration, self._step(iteration, minibatches), bar)
        return {observer: self._settled(observer, rule) for observer, rule in rules.items()}

    def _settled(self, observer: WeightObserver, rule: LearnedRounding) -> Settled:
        factor, scale = rule.scale_factor(), observer.scale
        if factor is not None and scale is not None:
            stored = self.error.grids[observer].rescaled(factor.detach()).stored
            assert stored is not None
            scale = stored.reshape(scale.shape)
        return Settled(rule.hard_codes(), scale)

    def _step(self, iteration: Iteration, minibatches: Minibatches) -> Callable[[bool], None]:
        """What takes a step, told whether there is a penalty."""
        if self.error.recompute or not can_capture(minibatches, self.error.objective, iteration.optimizer):
            return iteration.run
        captured = Captured(iteration.run, self.error.streams[0].device)  # with a penalty of weight 0 in the warm-up
        return lambda penalised: captured()

    def _optimise(self, iteration: Iteration, step: Callable[[bool], None], bar: tqdm) -> None:
        schedule, taken, name = Schedule(self.config), 0, self.error.segment.name
        patience = self.config.patience
        while not schedule.ended:
            beta = schedule.beta
            iteration.prepare(taken, beta, self.rule.pace(schedule.progress))
            step(beta is not None)
            taken += 1
            bar.update(schedule.advance())
            if taken % (patience or SHOWN) == 0:
                loss, penalty = (x / (patience or SHOWN) for x in iteration.losses())
                bar.set_postfix_str(f"{name}, loss {loss:.3f}")
                bar.update(schedule.judge(loss, penalty) if patience else 0)
        iteration.finish()
