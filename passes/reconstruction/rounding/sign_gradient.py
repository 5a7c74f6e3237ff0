"""AutoRound's rounding (SignRound, arXiv 2309.05516): offsets and scales learned by the signs of gradients.

The paper's quantizer, ``W~ = s clip(round(W / s + V), n, m)``, with ``V`` in [-1/2, 1/2] and the scale's factors in [0, 1], is
of integers. In a format with steps of several sizes ``V`` counts in steps of the element: between neighbouring levels
``low <= w / s <= up``,

    w~ = s up    where  w / s + V (up - low) >= (low + up) / 2,    else  s low,

which is the equation where steps are equal, and lets every weight reach both of its neighbours and no further level. (The
authors' code adds V itself to values of E2M1, whose steps are 1/2, 1 and 2: in the highest binade many weights then cannot be
moved.) The gradient passes rounding as if it were the identity, into V and into s.

Where scales are free numbers, each is multiplied by a factor ``1 + f``, learned with V; the scale of a symmetric format has
one end, so one factor stands for the paper's two. It may exceed 1: the scale that it starts from may be a searched one.
Scales of block formats (NVFP4, MXFP4) are low-bit numbers, and those of codebook groups were chosen together with their
codebooks: there V alone is learned. Steps are ``lr sign(gradient)``, lr falling linearly from ``1 / iters`` to 0, so that
nothing moves by more than 1/2 in all. The state of the least minibatch loss is the result, as in the authors' code: steps of
equal size do not settle, and where inputs are correlated the last state is often worse than the first.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fp4dit_ao.config import ReconstructionConfig
from fp4dit_ao.observers import Grid
from fp4dit_ao.observers.grid import Neighbours
from fp4dit_ao.passes.reconstruction.rounding.rule import LearnedRounding

BOUND = 0.5
"""The largest offset, in steps of the element, and the largest relative change of a scale."""
MARGIN = 1 / 64
"""How far beyond the middle an element starts that an earlier unit settled, in steps."""


class SignGradient(LearnedRounding):
    """One weight's offsets, and the factors of its scales.

    Attributes:
        offset: float32, V, shaped like the weight; zero at first, which is nearest rounding.
        stretch: float32, f, shaped like the stored scales; None where they cannot be changed.
    """

    keeps_best: ClassVar[bool] = True
    stretch: nn.Parameter | None

    def __init__(self, weight: Tensor, grid: Grid):
        super().__init__(weight, grid)
        self.grid, self.dtype, self.weight = grid, weight.dtype, weight.detach()
        self.offset = nn.Parameter(torch.zeros_like(grid.scale))
        self.stretch = None if grid.stored is None else nn.Parameter(torch.zeros_like(grid.stored, dtype=torch.float32))
        self._fixed = grid.neighbours(self.weight) if grid.stored is None else None

    @classmethod
    def optimizer(cls, rules: Sequence[LearnedRounding], config: ReconstructionConfig) -> Optimizer:
        parameters = [parameter for rule in rules for parameter in rule.parameters()]
        rate = config.relative_lr and rules[0].learning_rate(config.relative_lr)
        return SignSGD(parameters, config.lr or rate or 1 / max(1, config.iters), BOUND)

    @classmethod
    def pace(cls, progress: float) -> float:
        return 1 - progress

    def start_from(self, codes: Tensor) -> None:
        around = self.grid.bracket(self.weight)
        low, up = around.low, around.up
        middle = ((low + up) / 2 - around.position) / (up - low).clamp(min=torch.finfo(torch.float32).tiny)
        leaning = torch.where(codes == around.up_codes, (middle + MARGIN).clamp(min=0), (middle - MARGIN).clamp(max=0))
        self.offset.data.copy_(leaning.clamp(-BOUND, BOUND))

    def learning_rate(self, relative: float) -> float:
        """A gate of one logit more is open by a quarter of a step more."""
        return relative / 4

    def scale_factor(self) -> Tensor | None:
        return None if self.stretch is None else 1 + self.stretch

    def _scaled(self) -> tuple[Grid, Neighbours]:
        if self._fixed is not None:
            return self.grid, self._fixed
        factor = self.scale_factor()
        assert factor is not None
        grid = self.grid.rescaled(factor)
        return grid, grid.neighbours(self.weight)

    def forward(self, weight: Tensor) -> Tensor:
        """The rounded weight; its gradient is that of ``s (w / s + V (up - low))``, clipped to the levels."""
        grid, around = self._scaled()
        soft = torch.addcmul(around.position, self.offset, around.up - around.low)
        hard = torch.where(_takes_up(soft, around), around.up, around.low)
        return ((soft + (hard - soft).detach()) * grid.scale).to(self.dtype)

    def regularizer(self, beta: float | Tensor) -> Tensor:
        """0: every value is one of the grid's."""
        return self.offset.new_zeros(())

    @torch.no_grad()
    def hard_codes(self) -> Tensor:
        grid, around = self._scaled()
        soft = torch.addcmul(around.position, self.offset, around.up - around.low)
        codes = grid.bracket(self.weight)
        return torch.where(_takes_up(soft, around), codes.up_codes, codes.low_codes)


def _takes_up(soft: Tensor, around: Neighbours) -> Tensor:
    return (soft >= (around.low + around.up) / 2).detach()


class SignSGD(Optimizer):
    """``p <- clip(p - lr sign(gradient))``, clipped to ``[-bound, bound]``; it keeps no state.

    Args:
        parameters: to learn.
        lr: step of every element.
        bound: largest magnitude.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, bound: float):
        super().__init__(parameters, {"lr": lr, "bound": bound})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Take one step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign(), alpha=group["lr"]).clamp_(-group["bound"], group["bound"])
