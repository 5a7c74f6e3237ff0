"""Learned rounding: which of its two neighbouring codes every weight takes.

A weight w with group scale S sits between two levels of its lattice, ``low <= w / S <= low + s``, where s (in steps of the
lattice, one value per binade) is frozen from the original weight. A gate h in [0, 1] interpolates,

    w^ = S * clip(low + s * h, +-lattice_max),        h = clip(1.2 * sigmoid(v) - 0.1, 0, 1),

and ends hard: up where v >= 0. ``low`` is rounded toward minus infinity *in w's own binade*, so ``low + s`` is the next
level: at the top of a binade it is the first value of the next one. Both are codes of the format; only beyond
``lattice_max`` is there something to clip.

*AdaRound* (arXiv 2004.10568) learns ``v`` itself: dL/dv = S s dL/dw^ h'(v), so in floating point a weight's gradient shrinks
with its binade (FP4DiT, arXiv 2503.15465, Theorem 1). *Scale-aware AdaRound* learns ``alpha = S s v``: dL/dalpha =
dL/dw^ h'(alpha / (S s)), free of the step (Theorem 2). Under Adam, which divides by the gradient's size, the difference is
in the update instead: v moves by ``lr`` in every gate in the first case, by ``lr / (S s)`` in the second, so that every
*weight* moves by the same amount. Where the step is the same for all weights (integers, subnormals) the two coincide.
"""

import torch
from torch import Tensor, nn

from fp4dit_ao.observers import WeightObserver
from fp4dit_ao.ops import expand_scale

STRETCH, SHIFT = 1.2, 0.1
"""The rectified sigmoid ``clip(STRETCH * sigmoid(v) - SHIFT, 0, 1)`` reaches 0 and 1 at finite v."""


class AdaRound(nn.Module):
    """One weight's gates, as plain AdaRound learns them.

    Attributes:
        low: float32, shaped like the weight: the lower level, in lattice steps.
        step: distance to the upper level, in lattice steps.
        scale: float32 group scales, broadcast to the weight's shape.
        alpha: the learned parameter; ``alpha / unit`` is the gate's logit v.
        unit: 1 here, ``scale * step`` when scale-aware.
    """

    low: Tensor
    step: Tensor
    scale: Tensor
    unit: Tensor

    def __init__(self, weight: Tensor, observer: WeightObserver):
        super().__init__()
        assert observer.scale is not None
        self.lattice_max = float(observer.fmt.lattice_max)
        self.dtype = weight.dtype
        scale = expand_scale(observer.scale, weight, observer.block_size(weight))
        y = (weight.detach().float() / scale).clamp(-self.lattice_max, self.lattice_max)
        step = observer.fmt.element_step(y)
        low = torch.floor(y / step) * step
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("step", step, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("unit", self._unit(), persistent=False)
        fraction = (y - low) / step
        self.alpha = nn.Parameter(self.unit * torch.logit((fraction + SHIFT) / STRETCH))

    def _unit(self) -> Tensor:
        return torch.ones((), device=self.low.device)

    def learning_rate(self, relative: float) -> float:
        """``relative`` logits a step for the median weight, in the units of ``alpha``."""
        return relative

    def gate(self) -> Tensor:
        """h, in [0, 1]."""
        return (STRETCH * torch.sigmoid(self.alpha / self.unit) - SHIFT).clamp(0, 1)

    def forward(self, weight: Tensor) -> Tensor:
        """The softly rounded weight."""
        level = (self.low + self.step * self.gate()).clamp(-self.lattice_max, self.lattice_max)
        return (self.scale * level).to(self.dtype)

    def hard_levels(self) -> Tensor:
        """The learned levels, in lattice steps."""
        up = (self.alpha.detach() >= 0).float()
        return (self.low + self.step * up).clamp(-self.lattice_max, self.lattice_max)

    def regularizer(self, beta: float) -> Tensor:
        """``1 - |2 h - 1|^beta``, averaged over the weights: 0 when every gate is hard, 1 when all stand at one half."""
        return 1 - (2 * self.gate() - 1).abs().pow(beta).mean()


class ScaleAwareAdaRound(AdaRound):
    """Learns ``alpha = S s v``: every weight, not every gate, moves at the same speed."""

    def _unit(self) -> Tensor:
        return self.scale * self.step

    def learning_rate(self, relative: float) -> float:
        return relative * float(self.unit.median())


RULES: dict[str, type[AdaRound]] = {"adaround": AdaRound, "scale_aware": ScaleAwareAdaRound}
"""By name. A rule needs ``forward``, ``hard_levels``, ``regularizer``, ``learning_rate`` and ``parameters``."""
