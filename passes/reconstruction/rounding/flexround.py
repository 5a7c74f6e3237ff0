"""FlexRound (arXiv 2306.00317): every weight divided by a learned factor, then rounded to nearest. LRQ: factors of low rank.

With the group's scale s1, a factor S2 for every weight and s3 for every row, all positive and 1 at first,

    W^ = s1 Q(W / (s1 S2 s3)),

which starts at nearest rounding, rounds hard throughout, and can move a weight by more than one level. The gradient passes Q as
if it were the identity. As in the authors' code the logarithms are learned, so factors stay positive: ``dW^/d log S2`` is then
``-W / (S2 s3)``, so that under plain gradient descent large weights move more; under Adam every logarithm moves alike, and with
it the *ratio* of a weight to its step. In floating point a step is a fixed fraction of a weight, give or take two: one
learning rate serves all binades.

s1 is learned where scales are free numbers; those of NVFP4 and MXFP4 blocks and of codebook groups stay. A weight that is zero
stays zero, and none changes its sign. With E3M0, whose values are a factor of two apart, a weight has further to go. Learning
rates fall as a cosine to 0, as in the paper's recipe.

*LRQ* (arXiv 2407.11534) has ``log S2 = L U + r + c`` with L and U of low rank, a row's r (here the same as log s3) and a
column's c. L starts at 0 and U at random, of variance 1 / rank, so that the product's elements move at the learning rate. An
earlier unit's codes are no such matrix: they are kept as a fixed addend. Rows and columns move together, so that the last
of its states is not always among the best: that of the least minibatch error counts, which is not in the paper.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from fp4dit_ao.observers import Grid
from fp4dit_ao.passes.reconstruction.rounding.rule import LearnedRounding

HALVINGS = 16
"""Steps of the search for the divisor that gives a code, on the way from the weight to the code's value."""
MARGIN = 0.02
"""How much further on that way a settled weight starts, so that the next rounding of the divisor cannot undo it."""


class FlexRound(LearnedRounding):
    """One weight's divisors.

    Attributes:
        element: float32, log S2, shaped like the weight.
        row: float32 ``(out_features, 1)``, log s3.
        log_scale: float32, the logarithm of what stored scales are multiplied by, shaped like them; None where they stay.
    """

    log_scale: nn.Parameter | None

    def __init__(self, weight: Tensor, grid: Grid):
        super().__init__(weight, grid)
        self.grid, self.dtype, self.weight = grid, weight.dtype, weight.detach()
        self.row = nn.Parameter(torch.zeros_like(grid.scale[:, :1]))
        self.log_scale = (
            None if grid.stored is None else nn.Parameter(torch.zeros_like(grid.stored, dtype=torch.float32))
        )
        self._add_parameters()

    def _add_parameters(self) -> None:
        self.element = nn.Parameter(torch.zeros_like(self.grid.scale))

    def log_divisor(self) -> Tensor:
        """``log(S2 s3)``, shaped like the weight."""
        return self.element + self.row

    def _start_at(self, log_divisor: Tensor) -> None:
        self.element.data.copy_(log_divisor)

    @classmethod
    def pace(cls, progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * progress))

    @torch.no_grad()
    def start_from(self, codes: Tensor) -> None:
        weight, value, wanted = self.weight.float(), self.grid.decode(codes), self.grid.levels(codes)
        near, far = torch.zeros_like(weight), torch.ones_like(weight)
        for _ in range(HALVINGS):
            middle = (near + far) / 2
            there = self.grid.levels(self.grid.encode(weight + middle * (value - weight))) == wanted
            near, far = torch.where(there, near, middle), torch.where(there, middle, far)
        target = weight + (far + MARGIN * (1 - far)) * (value - weight)
        stays = (self.grid.levels(self.grid.encode(weight)) == wanted) | (target * weight <= 0)
        ratio = torch.where(stays, 1.0, weight / torch.where(stays, 1.0, target))
        self._start_at(ratio.log())

    def learning_rate(self, relative: float) -> float:
        """A gate of one logit more is open by a quarter of a step more; in logarithms, over the weight."""
        around = self.grid.bracket(self.weight)
        steps = (around.step / around.position.abs().clamp(min=torch.finfo(torch.float32).tiny)).median()
        return relative / 4 * float(steps.clamp(max=1))

    def scale_factor(self) -> Tensor | None:
        return None if self.log_scale is None else self.log_scale.exp()

    def _scaled(self) -> Grid:
        factor = self.scale_factor()
        return self.grid if factor is None else self.grid.rescaled(factor)

    def forward(self, weight: Tensor) -> Tensor:
        """The rounded weight; its gradient is that of ``s1 clip(W / (s1 S2 s3))``, and in s1 of the rounding, too."""
        grid, divided = self._scaled(), self.weight.float() * torch.exp(-self.log_divisor())
        position = grid.position(divided)
        level = (grid.round(divided.detach()) / grid.scale).detach()
        return ((position + (level - position).detach()) * grid.scale).to(self.dtype)

    def regularizer(self, beta: float | Tensor) -> Tensor:
        """0: every value is one of the grid's."""
        return self.row.new_zeros(())

    @torch.no_grad()
    def hard_codes(self) -> Tensor:
        return self._scaled().encode(self.weight.float() * torch.exp(-self.log_divisor()))


class LRQ(FlexRound):
    """One weight's divisors, of low rank.

    Attributes:
        left: float32 ``(out_features, rank)``, L; the rank is a quarter of the smaller side, as in the paper's models.
        right: float32 ``(rank, in_features)``, U.
        column: float32 ``(1, in_features)``, c.
        settled: float32, shaped like the weight, what an earlier unit's codes take; not learned.
    """

    keeps_best: ClassVar[bool] = True
    settled: Tensor

    def _add_parameters(self) -> None:
        rows, columns = self.grid.scale.shape
        rank = max(1, min(rows, columns) // 4)
        start = torch.randn(rank, columns, generator=torch.Generator().manual_seed(0)) / rank**0.5
        self.left = nn.Parameter(self.row.new_zeros(rows, rank))
        self.right = nn.Parameter(start.to(self.row))
        self.column = nn.Parameter(self.row.new_zeros(1, columns))
        self.register_buffer("settled", self.row.new_zeros(rows, columns), persistent=False)

    def log_divisor(self) -> Tensor:
        return self.settled + self.left @ self.right + self.row + self.column

    def _start_at(self, log_divisor: Tensor) -> None:
        self.settled.copy_(log_divisor)
