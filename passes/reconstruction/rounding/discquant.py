"""DiscQuant (arXiv 2501.06417): every weight drifts to one of its neighbours, except where the output objects.

With ``y = (W - low) / (up - low)`` and x in [0, 1] in place of it, ``W^ = (1 - x) low + x up``, the paper minimises

    rho * divergence(x) - <2 y - 1, x>:

the linear term draws each weight to its nearer neighbour, the divergence of outputs holds it back, and where there are fewer
directions of the output than weights, nearly all of them arrive at an end. Steps are those of the authors' code: the gradient
is

    -(2 y - 1) + clip(rho * gradient of the divergence, -1/2, 1/2),

Adam's step on it, with a warm-up and then half a cosine, is followed by clipping x to [0, 1], and what is left in between at
the end goes to the nearer end. x starts at y, where the output is right (the code's default start is random), without decay.

The divergence is the unit's error, relative to that of the rounding before and times the number of its weights, so that each
weight's share of it is of the size of the linear term: rho is a pure number. The paper's divergence is that of the whole
model: scope ``model``.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from fp4dit_ao.config import ReconstructionConfig
from fp4dit_ao.observers import Grid
from fp4dit_ao.passes.reconstruction.rounding.adaround import AdaRound
from fp4dit_ao.passes.reconstruction.rounding.rule import LearnedRounding

RHO = 1.0
"""Weight of the output's error."""
CLIP = 0.5
"""Its largest part in one weight's gradient, beside at most 1 of the linear term: weights nearer to a neighbour than a quarter
of the way always go there. The code has 0.5 to 1."""
LEARNING_RATE = 0.05
"""Of Adam, in widths of the interval between two neighbours."""
WARM_UP = 1 / 8
"""Fraction of the steps with a growing learning rate."""


class DiscQuant(AdaRound):
    """One weight's positions x between its neighbours.

    Attributes:
        alpha: float32, x, in [0, 1].
        drift: float32, ``2 y - 1``, in [-1, 1].
    """

    drift: Tensor

    def __init__(self, weight: Tensor, grid: Grid):
        super().__init__(weight, grid)
        self.register_buffer("drift", 2 * self.alpha.detach() - 1, persistent=False)

    def _alpha_of(self, gate: Tensor) -> Tensor:
        return gate.clamp(0, 1)

    @torch.no_grad()
    def start_from(self, codes: Tensor) -> None:
        super().start_from(codes)
        self.drift.copy_(2 * self.alpha - 1)  # toward the codes

    def gate(self) -> Tensor:
        return self.alpha

    def learning_rate(self, relative: float) -> float:
        """A gate of one logit more is open by a quarter more."""
        return relative / 4

    @classmethod
    def optimizer(cls, rules: Sequence[LearnedRounding], config: ReconstructionConfig) -> Optimizer:
        rate = config.relative_lr and rules[0].learning_rate(config.relative_lr)
        return DriftingAdam([rule for rule in rules if isinstance(rule, DiscQuant)], config.lr or rate or LEARNING_RATE)

    @classmethod
    def pace(cls, progress: float) -> float:
        if progress < WARM_UP:
            return (progress + WARM_UP / 8) / WARM_UP
        return 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))

    def regularizer(self, beta: float | Tensor) -> Tensor:
        """0: the optimizer draws weights to the grid."""
        return self.alpha.new_zeros(())

    def hard_codes(self) -> Tensor:
        return torch.where(self.alpha.detach() >= 0.5, self.up, self.low)


class DriftingAdam(torch.optim.Adam):
    """Adam's step on ``clip(rho n gradient, -CLIP, CLIP) - drift``, then clipping to [0, 1]; n weights in all.

    Args:
        rules: of a unit.
        lr: learning rate.
    """

    def __init__(self, rules: Sequence[DiscQuant], lr: float):
        super().__init__([rule.alpha for rule in rules], lr=lr)
        self.drifts = {rule.alpha: rule.drift for rule in rules}
        self.rate = RHO * sum(rule.alpha.numel() for rule in rules)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step."""
        for x, drift in self.drifts.items():
            if x.grad is not None:
                x.grad.mul_(self.rate).clamp_(-CLIP, CLIP).sub_(drift)
        found = super().step(closure)
        for x in self.drifts:
            x.clamp_(0, 1)
        return found
