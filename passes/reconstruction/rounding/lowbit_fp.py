"""The rounding of LowBit-FP (arXiv 2408.06995): AdaRound with a plain sigmoid, and one exponent for all of its regularizer.

    w^ = S (low + (up - low) sigma(v)),    loss + lambda sum(1 - |2 sigma(v) - 1|^20),    up where sigma(v) >= 1/2,

with ``low`` and ``up`` the neighbouring levels in the element's own step, as AdaRound here has them, and without the correction
for the step's size that FP4DiT adds. A plain sigmoid reaches neither 0 nor 1: a weight that lies on a level starts a
little beside it, and every gate keeps a gradient. The exponent 20 is flat nearly everywhere, so that gates are pushed only
once they are close to an end: what the threshold decides is mostly the reconstruction. The paper's text was not at hand; gate,
exponent and threshold are from summaries of it. lambda and the warm-up are the config's; gates close only with a larger
``regularizer`` than AdaRound's (10 rather than 1), and the threshold undoes what open ones had learned.
"""

import torch
from torch import Tensor

from fp4dit_ao.passes.reconstruction.rounding.adaround import AdaRound

EXPONENT = 20.0
"""Exponent of the regularizer, the same in every step."""
EDGE = 0.01
"""How far from its ends a gate starts at least: its logit would be infinite there."""


class LowBitFP(AdaRound):
    """One weight's gates, as LowBit-FP learns them."""

    def _alpha_of(self, gate: Tensor) -> Tensor:
        return torch.logit(gate, eps=EDGE)

    def gate(self) -> Tensor:
        """h, between 0 and 1."""
        return self.alpha.sigmoid()

    def regularizer(self, beta: float | Tensor) -> Tensor:
        """``1 - |2 h - 1|^20``, averaged over the weights; ``beta`` is not looked at."""
        return super().regularizer(EXPONENT)
