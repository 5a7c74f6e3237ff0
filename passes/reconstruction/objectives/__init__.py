"""Objectives: what learned rounding minimises. A file per method, and a line here that registers it.

To add one, write a class with the contract of :class:`Objective` in a new file, and register an instance below.
"""

from fp4dit_ao.passes.reconstruction.objectives.layer_weighted import LayerWeighted
from fp4dit_ao.passes.reconstruction.objectives.mse import MeanSquaredError
from fp4dit_ao.passes.reconstruction.objectives.objective import OBJECTIVES, Errors, Objective
from fp4dit_ao.passes.reconstruction.objectives.prediction_difference import PredictionDifference

OBJECTIVES.register(
    "mse", MeanSquaredError(), summary="Mean squared error of the unit's output, relative to the output's power.",
    source="AdaRound, arXiv 2004.10568, equation 25", cost="none",
)  # fmt: skip
OBJECTIVES.register(
    "layer_weighted", LayerWeighted(), summary="The same, and that of every linear inside the unit.",
    source="EDA-DM, arXiv 2401.04585", cost="one more forward of the unit a step; full-precision inputs of a unit in memory",
)  # fmt: skip
OBJECTIVES.register(
    "prediction_difference", PredictionDifference(),
    summary="The same, and that of the model's output behind the full-precision rest of the network.",
    source="PD-Quant, arXiv 2212.07048",
    cost="two forwards and a backward pass through the rest of the network a step, and one more forward of the unit; its "
    "full-precision inputs in memory",
)  # fmt: skip

__all__ = ["OBJECTIVES", "Errors", "LayerWeighted", "MeanSquaredError", "Objective", "PredictionDifference"]
