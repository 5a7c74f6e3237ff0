"""The prediction difference of PD-Quant (arXiv 2212.07048): what a unit's error does to the model's output."""

from typing import ClassVar

import torch
from torch import Tensor

from fp4dit_ao.passes.reconstruction.objectives.mse import MeanSquaredError
from fp4dit_ao.passes.reconstruction.objectives.objective import Errors


class PredictionDifference(MeanSquaredError):
    """``MSE(unit) / mean(full^2) + weight * MSE(prediction) / mean(full prediction^2)``.

    The prediction is the model's output, with the unit quantized and the rest of the network behind it in full precision. The
    paper compares class probabilities by the Kullback-Leibler divergence; between Gaussians of one variance, which the
    predictions of a diffusion model are means of, that divergence is a squared difference over twice the variance. Its weight
    by timestep depends on the scheduler, which a graph does not know: all calibration rows count alike.

    While a rounding is learned, half of all elements of the unit's input and of the activations inside are in full precision,
    as in the code (from QDrop): the unit's error is that of the mixed input, the prediction's that of the quantized input,
    activations inside drop in both. The paper's correction of activation statistics needs batch norms.

    Args:
        weight: of the prediction; both terms are relative errors. The paper divides its divergence by 0.1, in units that do not
            carry over.
        drop: probability that an element is not quantized while a rounding is learned; 0 quantizes all.
    """

    needs_tail: ClassVar[bool] = True

    def __init__(self, weight: float = 1.0, drop: float = 0.5):
        self.weight, self.drop = weight, drop

    def combined(self, errors: Errors) -> Tensor:
        unit = super().combined(errors)
        return unit + self.weight * torch.stack(list(errors.predictions)).mean() if errors.predictions else unit
