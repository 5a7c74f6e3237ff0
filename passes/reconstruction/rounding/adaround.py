"""Learned rounding: which of its two neighbouring codes every weight takes.

A weight w with group scale S sits between two neighbouring levels of its lattice, ``low <= w / S <= up``, ``up = low + s``;
s (in lattice steps, one value per binade) is frozen from the original weight. A gate h in [0, 1] interpolates,

    w^ = S * (low + (min(up, lattice_max) - low) * h),        h = clip(1.2 * sigmoid(v) - 0.1, 0, 1),

starts where w^ = w, and ends hard: up where v >= 0. ``low`` is rounded toward minus infinity *in w's own binade*, so ``up``
is a level too: at the top of a binade it is the first value of the next one. (A negative weight that is exactly the first
value of a binade counts to the binade below, where the level above it lies.) Only beyond ``lattice_max``, which a searched
scale can put below a weight, is there something to clip.

*AdaRound* (arXiv 2004.10568) learns ``v`` itself: dL/dv = S s dL/dw^ h'(v), so in floating point a weight's gradient shrinks
with its binade (FP4DiT, arXiv 2503.15465, Theorem 1). *Scale-aware AdaRound* learns ``alpha = S s v``: dL/dalpha =
dL/dw^ h'(alpha / (S s)), free of the step (Theorem 2). Under Adam, which divides by the gradient's size, the difference is
in the update instead: v moves by ``lr`` in every gate in the first case, by ``lr / (S s)`` in the second, so that every
*weight* moves by the same amount. Where the step is the same for all weights (integers, subnormals) the two coincide.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fp4dit_ao.observers import Grid
from fp4dit_ao.passes.reconstruction.rounding.rule import LearnedRounding

STRETCH, SHIFT = 1.2, 0.1
"""The rectified sigmoid ``clip(STRETCH * sigmoid(v) - SHIFT, 0, 1)`` reaches 0 and 1 at finite v."""
LEAN = 0.49
"""How far from its settled end a gate may start again, as a fraction of how far the original weight is from it."""


class AdaRound(LearnedRounding):
    """One weight's gates, as plain AdaRound learns them.

    Attributes:
        low: uint8 codes of the lower levels, shaped like the weight.
        up: codes of the upper levels.
        alpha: float32, the learned parameter; ``alpha * slope`` is the gate's logit v.
        slope: None for 1 here; ``1 / (S s)`` when scale-aware.
    """

    low: Tensor
    up: Tensor
    base: Tensor
    span: Tensor
    slope: Tensor | None

    def __init__(self, weight: Tensor, grid: Grid):
        super().__init__(weight, grid)
        self.dtype = weight.dtype
        self._gate: Tensor | None = None
        around = grid.bracket(weight.detach())
        self.register_buffer("low", around.low_codes, persistent=False)
        self.register_buffer("up", around.up_codes, persistent=False)
        self.register_buffer("base", grid.scale * around.low, persistent=False)
        self.register_buffer("span", grid.scale * (around.up - around.low), persistent=False)
        self.register_buffer("slope", self._slope(grid.scale * around.step), persistent=False)
        position = (around.position - around.low) / around.step
        self.alpha = nn.Parameter(self._alpha_of(position))

    def _alpha_of(self, gate: Tensor) -> Tensor:
        """The parameter at which the gates are these, in [0, 1]."""
        logit = torch.logit((gate + SHIFT) / STRETCH)
        return logit if self.slope is None else logit / self.slope

    @torch.no_grad()
    def start_from(self, codes: Tensor) -> None:
        settled = (codes == self.up).float()
        self.alpha.copy_(self._alpha_of(settled + LEAN * (self.gate() - settled)))

    def _slope(self, step: Tensor) -> Tensor | None:
        """Of the logit over alpha, where ``step`` (``S s``, in weight units) is the distance between the levels."""
        return None

    def learning_rate(self, relative: float) -> float:
        """``relative`` logits a step for the median weight, in the units of ``alpha``."""
        return relative

    def variable(self) -> Tensor:
        """What stands for :attr:`alpha` in the gates: the parameter itself."""
        return self.alpha

    def gate(self) -> Tensor:
        """h, in [0, 1]."""
        gate: Tensor = _Gate.apply(self.variable(), self.slope)  # type: ignore[no-untyped-call]
        return gate

    def forward(self, weight: Tensor) -> Tensor:
        """The softly rounded weight."""
        self._gate = self.gate()
        return torch.addcmul(self.base, self.span, self._gate).to(self.dtype)

    def regularizer(self, beta: float | Tensor) -> Tensor:
        """``1 - |2 h - 1|^beta``, averaged over the weights: 0 when every gate is hard, 1 when all stand at one half.

        Uses the gates of the last ``forward``, so that a step computes them once.
        """
        gate, self._gate = self.gate() if self._gate is None else self._gate, None
        penalty: Tensor = _Penalty.apply(gate, beta)  # type: ignore[no-untyped-call]
        return penalty

    def hard_codes(self) -> Tensor:
        """The learned codes."""
        return torch.where(self.variable().detach() >= 0, self.up, self.low)


class ScaleAwareAdaRound(AdaRound):
    """Learns ``alpha = S s v``: every weight, not every gate, moves at the same speed."""

    def _slope(self, step: Tensor) -> Tensor | None:
        return 1 / step

    def learning_rate(self, relative: float) -> float:
        assert self.slope is not None
        return relative / float(self.slope.median())


class _Gate(torch.autograd.Function):
    """``h(alpha * slope)``; its derivative, in h itself, takes a third of the memory traffic that autograd's would."""

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, slope: Tensor | None) -> Tensor:
        gate = alpha.sigmoid() if slope is None else (alpha * slope).sigmoid_()
        gate = gate.mul_(STRETCH).sub_(SHIFT).clamp(0, 1)  # not in place: torch.compile of 2.11 would lose the gradient
        ctx.save_for_backward(gate, slope)
        return gate

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gate, slope = ctx.saved_tensors
        # with sigmoid = (h + SHIFT) / STRETCH and STRETCH = 1 + 2 SHIFT: h' = (h (1 - h) + SHIFT (1 + SHIFT)) / STRETCH
        inside = torch.addcmul(gate, gate, gate, value=-1)
        offset = SHIFT * (1 + SHIFT)
        derivative = nn.functional.threshold(inside, 0.0, -offset, inplace=True).add_(offset)
        derivative.mul_(gradients[0]).div_(STRETCH)
        return (derivative if slope is None else derivative.mul_(slope)), None


class _Penalty(torch.autograd.Function):
    """``mean(1 - |2 h - 1|^beta)``, with the one power that value and derivative share."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, beta: float | Tensor) -> Tensor:
        if not isinstance(beta, Tensor):
            beta = torch.full(
                (), beta, dtype=torch.float64, device=gate.device
            )  # a CUDA graph copies nothing from the host
        signed = gate * 2 - 1
        distance = signed.abs()
        power = distance.log2().mul_(beta - 1).exp2_()  # of distance 0: exp2(-inf) = 0; quicker than pow
        ctx.save_for_backward(torch.copysign(power, signed), beta)
        # the compiler joins product and sum with what is before them, and calls a library for a dot product
        compiling = torch.compiler.is_compiling()
        total = (power * distance).sum() if compiling else torch.dot(power.flatten(), distance.flatten())
        return 1 - total / gate.numel()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        power, beta = ctx.saved_tensors
        return power * (gradients[0] * beta * (-2 / power.numel())), None
