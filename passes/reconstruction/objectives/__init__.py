"""Objectives: what learned rounding minimises. A file per method, and a line here that registers it.

To add one, write a class with the contract of :class:`Objective` in a new file, and register an instance below.
"""

from fp4dit_ao.passes.reconstruction.objectives.mse import MeanSquaredError
from fp4dit_ao.passes.reconstruction.objectives.objective import OBJECTIVES, Objective

OBJECTIVES.register(
    "mse", MeanSquaredError(), summary="Mean squared error of the unit's output, relative to the output's power.",
    source="AdaRound, arXiv 2004.10568, equation 25", cost="none",
)  # fmt: skip

__all__ = ["OBJECTIVES", "MeanSquaredError", "Objective"]
